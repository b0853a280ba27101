"""One configuration of a study, as its file gives it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dskd_lightning.errors import UserError
from dskd_lightning.launch.configs import config_path
from dskd_lightning.runs.run_folder import TEACHER
from dskd_lightning.study.names import check_name
from dskd_lightning.study.reading import mapping, texts

__all__ = ["Variant", "read_variant"]


@dataclass(frozen=True)
class Variant:
    """One configuration of a study.

    Args:
        name: its folder and its name in tables, see `check_name`.
        config: keys laid over the base configs, as in a YAML file.
        configs: more YAML files, relative to the study file.
        train: False evaluates the student as it is before training.
        teacher: evaluates the teacher in the student's place; nothing trains.
        grid: ``key -> values``; every combination is trained in ``grid/NAME/SETTINGS``, a folder
            called by a digest of all its settings; the best on validation is tested and linked as
            ``NAME``.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    configs: tuple[str, ...] = ()
    train: bool = True
    grid: dict[str, list[Any]] = field(default_factory=dict)
    teacher: bool = False

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the grid; one empty point without a grid."""
        return [
            dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())
        ]


def read_variant(path: Path, name: str, values: object, grid: dict[str, list[Any]]) -> Variant:
    """A variant's values in the study file, checked.

    Args:
        path: the study file.
        name: of the variant.
        values: what the file has under the name.
        grid: the study's own, for variants that train and have none.

    Raises:
        UserError: a value is malformed, or a key unknown.
    """
    check_name(path, name)
    key = f"variants.{name}"
    options = mapping(path, key, values)
    unknown = sorted(options.keys() - {"config", "configs", "train", "grid", "model"})
    if unknown:
        raise UserError(f"{path}: {key} has an unknown key {unknown[0]!r}.")
    train = options.get("train", True)
    if not isinstance(train, bool):
        raise UserError(f"{path}: `{key}.train` must be true or false.")
    if options.get("model") not in (None, TEACHER):
        raise UserError(f"{path}: `{key}.model` can be {TEACHER}, which is evaluated, or be left out.")
    teacher = options.get("model") == TEACHER
    train = train and not teacher
    own = mapping(path, f"{key}.grid", options["grid"], lists=True) if "grid" in options else grid
    files = texts(path, f"{key}.configs", options.get("configs"))
    return Variant(
        name=name,
        config=mapping(path, f"{key}.config", options.get("config")),
        configs=tuple(str((path.parent / config_path(file)).resolve()) for file in files),
        train=train,
        grid=own if train else {},
        teacher=teacher,
    )
