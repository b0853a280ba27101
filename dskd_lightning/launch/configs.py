"""The configs that come with the package, by name: ``dskd:quickstart`` is ``configs/quickstart.yaml``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path

from dskd_lightning.errors import UserError

__all__ = ["config_folder", "config_names", "config_path", "config_summary", "with_shipped_configs"]

_PREFIX = "dskd:"
_PACKAGE = Path(__file__).resolve().parents[1]


def config_folder() -> Path:
    """Where they lie: inside an installed package, beside it in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def config_names() -> list[str]:
    """Every name, with the folders and without ``.yaml``."""
    folder = config_folder()
    return sorted(path.relative_to(folder).as_posix()[: -len(".yaml")] for path in folder.rglob("*.yaml"))


def config_path(name: str) -> Path:
    """The file of a config that is called ``dskd:NAME``; any other ``name`` is a file of the user's.

    Raises:
        UserError: no config that comes with the package is called so.
    """
    if not name.startswith(_PREFIX):
        return Path(name)
    wanted, known = name[len(_PREFIX) :].removesuffix(".yaml"), config_names()
    if wanted not in known:
        close = [f"{_PREFIX}{match}" for match in get_close_matches(wanted, known, n=2, cutoff=0.5)]
        meant = f" did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"There is no config {name!r}:{meant} `dskd config list` shows all of them.")
    return config_folder() / f"{wanted}.yaml"


def config_summary(name: str) -> str:
    """The first sentence of a config's header."""
    lines = config_path(f"{_PREFIX}{name}").read_text(encoding="utf-8").splitlines()
    header = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=\.) ", header)[0]


def with_shipped_configs(arguments: Sequence[str]) -> list[str]:
    """A command line in which each ``dskd:NAME`` after ``--config`` is that file's path.

    Raises:
        UserError: a name is unknown.
    """
    found: list[str] = []
    for word in arguments:
        option, equals, value = word.partition("=")
        if option in ("--config", "-c") and value.startswith(_PREFIX):
            word = f"{option}{equals}{config_path(value)}"
        elif word.startswith(_PREFIX) and found and found[-1] in ("--config", "-c"):
            word = str(config_path(word))
        found.append(word)
    return found
