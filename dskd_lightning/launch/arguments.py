"""A function's signature and docstring as a command line."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser

__all__ = ["option", "run_function"]


def option(key: str, value: object) -> str:
    """``--key=value`` as a parser reads ``value`` back; JSON's quotes would become part of a text."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def run_function(function: Callable[..., object], arguments: Sequence[str], prog: str) -> object:
    """Call ``function`` with options parsed from ``arguments``.

    Parameters without a default are positional; lists of strings take any number of words, and a
    positional one follows the others.
    ``--fail-if`` and ``--fail_if`` are the same option.
    """
    summary = (inspect.getdoc(function) or "").split("\n\n")[0]
    parser = ArgumentParser(prog=prog, description=summary, allow_abbrev=False)
    lists = _list_parameters(function)
    parser.add_function_arguments(function, as_positional=True, skip=set(lists))
    for name, required in lists.items():
        parser.add_argument(
            name if required else f"--{name}", nargs="+", type=str, help=f"One or more {name}."
        )
    config = parser.parse_args([_underscored(argument) for argument in arguments])
    return function(**parser.instantiate_classes(config).as_dict())


def _list_parameters(function: Callable[..., object]) -> dict[str, bool]:
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    lists = (list[str], list[str] | None)
    return {p.name: p.default is inspect.Parameter.empty for p in parameters if hints.get(p.name) in lists}


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
