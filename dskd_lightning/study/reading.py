"""A study file's values, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dskd_lightning.errors import UserError
from dskd_lightning.launch.arguments import read_yaml

__all__ = ["mapping", "read_values", "texts"]

_KEYS = frozenset({"output", "base", "variants", "select", "report", "grid"})


def read_values(path: Path) -> dict[str, Any]:
    """The top level of a study file.

    Raises:
        UserError: it is missing, malformed, or has an unknown key.
    """
    values = read_yaml(path)
    if not {"base", "variants"} <= values.keys():
        raise UserError(f"{path}: a study needs the keys `base` and `variants`.")
    if unknown := sorted(map(str, values.keys() - _KEYS)):
        raise UserError(f"{path}: unknown key {unknown[0]!r} in the study.")
    for key, kind in (("output", str), ("select", str), ("report", bool)):
        if values.get(key) is not None and not isinstance(values[key], kind):
            raise UserError(f"{path}: `{key}` must be a {'text' if kind is str else 'boolean'}.")
    return values


def mapping(path: Path, key: str, value: object, lists: bool = False) -> dict[str, Any]:
    """``value`` as a mapping, of lists with something in them where ``lists``; None is an empty one.

    Raises:
        UserError: it is something else.
    """
    found = {} if value is None else value
    if not isinstance(found, dict):
        raise UserError(f"{path}: `{key}` must hold keys and values, not {type(value).__name__}.")
    for name, item in found.items():
        if lists and (not isinstance(item, list) or not item):
            raise UserError(f"{path}: `{key}.{name}` must be a list of values to try.")
    return {str(name): item for name, item in found.items()}


def texts(path: Path, key: str, value: object) -> Sequence[str]:
    """``value`` as a list of texts; None is an empty one.

    Raises:
        UserError: it is something else.
    """
    found = [] if value is None else value
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise UserError(f"{path}: `{key}` must be a list of files.")
    return found
