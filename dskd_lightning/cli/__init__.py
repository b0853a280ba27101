"""The command line, `dskd`."""

from dskd_lightning.cli.main import main

__all__ = ["main"]
