"""Whether a run measures what its best checkpoint is to be chosen by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import lightning as L

from dskd_lightning.errors import UserError
from dskd_lightning.runs.validation_metrics import (
    ALIGNED,
    CLOSENESS,
    KNOWN,
    LIKELIHOOD,
    ON_SAMPLES,
    RESPONSES,
)

if TYPE_CHECKING:
    from dskd_lightning.module import DistillationModule

__all__ = ["check_measured", "check_value"]


def check_measured(metric: str, trainer: L.Trainer, module: DistillationModule) -> None:
    """Check before training that its validations will log ``metric``, as far as it is the library's.

    Raises:
        UserError: they won't.
    """
    if metric not in KNOWN:
        return
    name = metric.removeprefix("val/")
    measured = {*LIKELIHOOD}
    remedy = "name one of these"
    first = module.teacher_specs[0] if module.teacher_specs else None
    if first is not None and not getattr(first, "absent", False):
        measured |= _closeness(cast("Any", trainer).datamodule)
    for callback in cast("Any", trainer).callbacks:
        measured |= set(_measures(callback, module))
    if name in RESPONSES:
        remedy = "set validation.prompts"
    elif name in ON_SAMPLES:
        remedy = "set samples.prompts"
    if name not in measured:
        shown = ", ".join(f"val/{other}" for other in sorted(measured) if f"val/{other}" in KNOWN)
        raise UserError(f"best.monitor: this run doesn't measure {metric} but {shown}: {remedy}.")
    if not _validates(trainer):
        raise UserError(
            f"best.monitor: {metric} needs a validation: set data.val or data.val_split, and leave "
            "trainer.limit_val_batches above 0."
        )


def check_value(metric: str, trainer: L.Trainer) -> None:
    """Check behind a validation that it logged ``metric``, which others' code may have promised.

    Raises:
        UserError: it didn't.
    """
    if metric not in trainer.callback_metrics:
        logged = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
        raise UserError(f"best.monitor: validation logged no {metric} but {logged}: log it, or name another.")


def _measures(callback: Any, module: DistillationModule) -> Iterable[str]:
    """What a callback adds to the validations' metrics."""
    found = getattr(callback, "validation_metrics", None)
    return () if found is None else cast("Iterable[str]", found(module))


def _closeness(datamodule: Any) -> set[str]:
    renderers = getattr(datamodule, "renderers", None)
    if renderers is None:  # other loaders: their batches say it
        return {*CLOSENESS, *ALIGNED}
    student, teacher = renderers[:2]
    return {*CLOSENESS} if teacher.fingerprint == student.fingerprint else {*ALIGNED}


def _validates(trainer: L.Trainer) -> bool:
    stages = getattr(cast("Any", trainer).datamodule, "stages", None)
    return trainer.limit_val_batches != 0 and (stages is None or "val" in stages())
