"""Objects as plain values, from which a checkpoint gives them back without unpickling anything."""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import fields, is_dataclass
from typing import Any

from dskd_lightning.errors import UserError

__all__ = ["Described", "described", "restored"]

_PACKAGE = __name__.partition(".")[0]


class Described:
    """Remembers the arguments that it was made with."""

    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        try:
            arguments = dict(inspect.signature(cls.__init__).bind(made, *args, **kwargs).arguments)
        except TypeError:  # a copy is made without arguments and takes over what the original remembers
            return made
        arguments.pop(next(iter(arguments)))  # self
        object.__setattr__(made, "_arguments", arguments)
        return made


def described(value: Any) -> Any:
    """``value`` in plain types: what is `Described` or a dataclass of this package by class and arguments.

    Raises:
        UserError: something else is in it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, dict):
        return {str(key): described(item) for key, item in value.items()}
    arguments = None
    if isinstance(value, Described):
        arguments = getattr(value, "_arguments", None)
    elif is_dataclass(value) and type(value).__module__.startswith(f"{_PACKAGE}."):
        arguments = {f.name: getattr(value, f.name) for f in fields(value)}
    if arguments is None:
        raise UserError(f"A {type(value).__name__} has no plain form.")
    kind = type(value)
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": {name: described(item) for name, item in arguments.items()},
    }


def restored(value: Any) -> Any:
    """What `described` described. Nothing is imported but this package's modules, and no function is called.

    Raises:
        UserError: a class is none that can be described, or is another package's and not imported yet.
    """
    if isinstance(value, list):
        return [restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {"class_path", "init_args"}:
        return {key: restored(item) for key, item in value.items()}
    kind = _class(str(value["class_path"]))
    return kind(**{name: restored(item) for name, item in value["init_args"].items()})


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] == _PACKAGE:
        importlib.import_module(module)
    found = getattr(sys.modules.get(module), name, None)
    if found is None:
        raise UserError(f"The checkpoint needs the class {path}: import {module} first.")
    ours = isinstance(found, type) and (
        issubclass(found, Described) or (is_dataclass(found) and module.startswith(f"{_PACKAGE}."))
    )
    if not ours:
        raise UserError(
            f"The checkpoint names {path}, which is no objective, divergence or spec: it is damaged."
        )
    return found
