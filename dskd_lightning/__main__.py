"""`python -m dskd_lightning` is `dskd`."""

from dskd_lightning.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
