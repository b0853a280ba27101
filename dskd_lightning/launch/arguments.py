"""A function's signature and docstring as a command line."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from dskd_lightning.errors import UserError

__all__ = ["check_configs", "option", "read_yaml", "run_function", "settings_of"]


def option(key: str, value: object) -> str:
    """``--key=value`` as a parser reads ``value`` back; JSON's quotes would become part of a text."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def settings_of(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What a config says under ``key``, also where it names a class for it; empty for nothing."""
    value = config.get(key)
    if isinstance(value, dict) and "class_path" in value:
        value = value.get("init_args")
    return value if isinstance(value, dict) else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one.

    Raises:
        UserError: it can't be read, isn't YAML, or holds something else.
    """
    try:
        values = yaml.safe_load(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except RecursionError as error:
        raise UserError(f"{path}: is nested too deep to be a config; restore the file.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no UTF-8, dates that are none
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not YAML ({reason}); correct or restore the file.") from error
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: must hold keys and values, not {type(values).__name__}; correct the file.")
    return values or {}


def check_configs(arguments: Sequence[str]) -> None:
    """Read every file of ``--config``, whose damage the parser would tell by a traceback.

    Raises:
        UserError: one can't be read.
    """
    following = [*arguments[1:], ""]
    for argument, value in zip(arguments, following, strict=True):
        name, equals, given = argument.partition("=")
        path = given if equals else value
        if name == "--config" and "\n" not in path and len(path) < 4096 and Path(path).is_file():
            read_yaml(Path(path))


def run_function(function: Callable[..., object], arguments: Sequence[str], prog: str) -> object:
    """Call ``function`` with options parsed from ``arguments``.

    Parameters without a default are positional, and may be given by their names instead; lists of strings
    take any number of words, and a positional one follows the others, as do ``*words``.
    ``--fail-if`` and ``--fail_if`` are the same option, and so are ``--yes`` and ``--yes true``.
    """
    summary = (inspect.getdoc(function) or "").split("\n\n")[0]
    parser = ArgumentParser(prog=prog, description=summary, allow_abbrev=False)
    arguments = _with_flags(function, [_underscored(argument) for argument in arguments])
    options = {argument.partition("=")[0] for argument in arguments}
    lists = _list_parameters(function)
    named = {name: kind for name, kind in _positional(function).items() if f"--{name}" in options}
    parser.add_function_arguments(function, as_positional=True, skip={*lists, *named})
    for name, kind in named.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    for name, required in lists.items():
        option = f"--{name}" if not required or f"--{name}" in options else name
        parser.add_argument(option, nargs="+", type=str, help=f"One or more {name}.")
    words = _words_parameter(function)
    if words is not None:
        parser.add_argument(words, nargs="*", type=str, help=f"Any number of {words}.")
    config = parser.parse_args(arguments)
    values = parser.instantiate(config).as_dict()
    rest = [] if words is None else values.pop(words)
    if not rest:
        return function(**values)
    return function(
        *(values[name] for name in inspect.signature(function).parameters if name in values), *rest
    )


def _positional(function: Callable[..., object]) -> dict[str, Any]:
    """The types of the parameters that must be given, but for lists of strings."""
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    required = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return {name: hints[name] for name in required if hints[name] != list[str]}


def _words_parameter(function: Callable[..., object]) -> str | None:
    kinds = inspect.signature(function).parameters.values()
    return next((p.name for p in kinds if p.kind is inspect.Parameter.VAR_POSITIONAL), None)


def _list_parameters(function: Callable[..., object]) -> dict[str, bool]:
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    lists = (list[str], list[str] | None)
    return {p.name: p.default is inspect.Parameter.empty for p in parameters if hints.get(p.name) in lists}


def _with_flags(function: Callable[..., object], arguments: Sequence[str]) -> list[str]:
    """``true`` behind each option for a boolean that has no value of its own."""
    flags = {f"--{name}" for name, hint in typing.get_type_hints(function).items() if hint is bool}
    following = [*arguments, "--"][1:]
    return [
        f"{word}=true" if word in flags and after.startswith("-") else word
        for word, after in zip(arguments, following, strict=True)
    ]


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
