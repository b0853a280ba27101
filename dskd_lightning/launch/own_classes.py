"""`model` and `data` of a config by ``class_path``: subclasses of one's own on the command line.

``model: {class_path: my.Module, init_args: {student: ...}}`` is read as ``model: {student: ...}`` of that
class, so that a base config without a class can be laid under it, and is written as it was given.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from dskd_lightning.data import InstructionDataModule
from dskd_lightning.errors import UserError
from dskd_lightning.launch.arguments import read_yaml
from dskd_lightning.module import DistillationModule
from dskd_lightning.runs.text import visible

__all__ = ["OwnClasses", "OwnClassesParser"]

_BASES: dict[str, tuple[type, type]] = {
    "model": (DistillationModule, DistillationModule),
    "data": (L.LightningDataModule, InstructionDataModule),
}
"""Of each key the class that others derive from, and the one that is taken where none is named."""


class OwnClasses:
    """The classes that a command line and its config files name for ``model`` and ``data``.

    Args:
        arguments: the command line.

    Attributes:
        arguments: the command line without class paths, for a parser of these classes.
        chosen: ``model`` and ``data`` -> class.
        paths: key -> class path, of those that were named.

    Raises:
        UserError: a class can't be imported or is of another kind.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.paths: dict[str, str] = {}
        self.arguments: list[str] = []
        words = iter(arguments)
        for word in words:
            name, equals, value = word.partition("=")
            if name in ("--config", "-c"):
                value = value if equals else next(words, "")
                self.arguments += [name, self._plain_config(value)] if value else [word]
                continue
            key, _, rest = name.removeprefix("--").partition(".")
            if name.startswith("--") and key in _BASES and rest == "class_path":
                self.paths[key] = value if equals else next(words, "")
            elif name.startswith("--") and key in _BASES and rest.startswith("init_args."):
                self.arguments.append(f"--{key}.{rest.removeprefix('init_args.')}{equals}{value}")
            else:
                self.arguments.append(word)
        self.chosen = {
            key: self._load(key, self.paths[key]) if key in self.paths else default
            for key, (_, default) in _BASES.items()
        }

    def _plain_config(self, given: str) -> str:
        """A config file as it was given, or the text of one from which class paths were taken out."""
        inline = "\n" in given or len(given) > 4096 or not Path(given).is_file()
        try:
            values = yaml.safe_load(given) if inline else read_yaml(Path(given))
        except yaml.YAMLError:
            return given  # the parser says what is wrong
        parts = {k: v for k, v in values.items() if k in _BASES} if isinstance(values, dict) else {}
        named = {k: v for k, v in parts.items() if isinstance(v, dict) and "class_path" in v}
        for key, part in named.items():
            others = sorted(part.keys() - {"class_path", "init_args"})
            if others:
                raise UserError(
                    f"{key}.{others[0]}: beside {key}.class_path it belongs under {key}.init_args."
                )
            self.paths[key] = str(part["class_path"])
            values[key] = part.get("init_args") or {}
        return yaml.safe_dump(values, sort_keys=False) if named else given

    @staticmethod
    def _load(key: str, path: str) -> type:
        module, _, name = path.rpartition(".")
        base = _BASES[key][0]
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"{key}.class_path: {path} can't be imported ({error}); install it, or set PYTHONPATH."
            ) from error
        if not (isinstance(found, type) and issubclass(found, base)):
            raise UserError(f"{key}.class_path: {path} is no subclass of {base.__name__}.")
        return found

    def written(self, text: str) -> str:
        """A config in YAML with the class paths at their places again."""
        values: dict[str, Any] = yaml.safe_load(text)
        for key, path in self.paths.items():
            if key in values:
                values[key] = {"class_path": path, "init_args": values[key]}
        header = "".join(line for line in text.splitlines(True) if line.startswith("#"))
        return header + yaml.safe_dump(values, sort_keys=False)


class OwnClassesParser(LightningArgumentParser):
    """Writes configs that name the classes; what its errors quote of a config can't steer a terminal."""

    own_classes: OwnClasses | None = None

    def dump(self, *args: Any, **options: Any) -> str:
        text = super().dump(*args, **options)
        # Lightning asks with link targets for the arguments of the classes, not for a config.
        shown = self.own_classes is not None and options.get("skip_link_targets", True)
        return self.own_classes.written(text) if shown and self.own_classes is not None else text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(visible(message), ex)

    def accepts(self, key: str) -> bool:
        """Whether there is a setting ``key``."""
        return any(action.dest == key for action in self._actions)
