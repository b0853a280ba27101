"""`dskd cache`: what a run reads of its teachers, before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

from dskd_lightning.errors import UserError
from dskd_lightning.launch.configs import config_path
from dskd_lightning.launch.lightning_cli import DistillationCLI
from dskd_lightning.models.spec import TeacherSpec
from dskd_lightning.models.teacher_cache_settings import CacheDtype, TeacherCacheSettings
from dskd_lightning.runs.parts import Part
from dskd_lightning.teacher_cache.attach import build_part, cache_root, ensure_caches, join_caches
from dskd_lightning.teacher_cache.log_probabilities import ensure_log_probabilities

__all__ = ["build_cache"]

_DTYPES = get_args(CacheDtype)


def build_cache(
    config: list[str],
    output: str | None,
    dtype: str | None,
    estimate: bool = False,
    part: str | None = None,
    join: list[str] | None = None,
) -> None:
    """Build the caches of the training and validation data; no student is loaded.

    Args:
        config: YAML files of the run, or names of shipped ones.
        output: folder of the caches, instead of the config's.
        dtype: how states are stored, instead of the config's.
        estimate: say what would be asked of the teachers' endpoints, and ask nothing.
        part: ``3/16`` computes every sixteenth shard, beginning with the third.
        join: folders of caches to copy what is missing from.

    Raises:
        UserError: the config names no teacher, or the caches can't be built.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"--dtype: {dtype} is unknown; choose one of {', '.join(_DTYPES)}.")
    chosen = None if part is None else Part.parse(part)
    if chosen is not None and (join or estimate):
        raise UserError("--part: computes, where --join copies and --estimate only tells; give one of them.")
    arguments = [word for file in config for word in ("--config", str(config_path(file)))]
    run = DistillationCLI(run=False, args=[*arguments, "--trainer.logger=false"])
    if not run.model.teacher_specs:
        raise UserError("model.teacher: the config names no teacher, whose states could be stored.")
    settings = run.datamodule.teacher_cache or TeacherCacheSettings()
    changes: dict[str, Any] = {"folder": output, "dtype": dtype}
    settings = replace(settings, build=True, **{k: v for k, v in changes.items() if v is not None})
    teachers = cast("list[TeacherSpec]", run.model.teacher_specs)
    run.datamodule.teacher_cache = settings
    if estimate:
        for found in ensure_log_probabilities(run.datamodule, teachers, estimate_only=True):
            print(f"the teacher's endpoint would get {found}")
        return
    stages, root = run.datamodule.stages("fit"), cache_root(run.datamodule, settings)
    if chosen is not None:
        if any(spec.absent for spec in teachers):
            raise UserError("--part: a teacher behind an endpoint or in a file is asked by one job.")
        build_part(run.datamodule, teachers, stages, settings, chosen)
        print(f"{chosen} of the teacher cache complete in {root}")
        return
    if join:
        join_caches(run.datamodule, teachers, stages, settings, [Path(place).expanduser() for place in join])
    ensure_caches(run.datamodule, teachers, stages, settings)
    ensure_log_probabilities(run.datamodule, teachers)
    print(f"teacher cache complete in {root}")
