"""What can't train sharded, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from dskd_lightning.errors import UserError
from dskd_lightning.models.loaded import Loaded
from dskd_lightning.models.spec import TeacherSpec, teacher_names
from dskd_lightning.strategies.fsdp2 import DSKDModelParallelStrategy

__all__ = ["check_strategy", "check_strategy_name"]

_OURS = "dskd_lightning.strategies.DSKDModelParallelStrategy (`--config dskd:strategy/fsdp2`)"


def check_strategy_name(name: str) -> None:
    """Refuse a strategy by its registered name or class path, which may not even be installed.

    Raises:
        UserError: it shards in its own way.
    """
    own = name.rpartition(".")[2]
    if own.startswith(("deepspeed", "fsdp")) or own in (
        DeepSpeedStrategy.__name__, FSDPStrategy.__name__, ModelParallelStrategy.__name__
    ):  # fmt: skip
        raise _foreign(name)


def check_strategy(
    trainer: L.Trainer, teachers: Sequence[TeacherSpec | Loaded], cached: bool = False
) -> None:
    """Refuse what doesn't go together with the trainer's strategy.

    Args:
        trainer: with its callbacks.
        teachers: of the module.
        cached: their states may be read instead.

    Raises:
        UserError: with what to take instead.
    """
    strategy: Any = trainer.strategy
    if isinstance(strategy, DSKDModelParallelStrategy):
        strategy.check()
    elif isinstance(strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
        raise _foreign(type(strategy).__name__)
    else:
        return
    if len(teachers) > 1 and any(teacher_names(teachers)):
        raise UserError(
            "model.teacher.name: ranks that share sharded weights must run the same teachers, which records "
            "of different teachers don't let them: take `trainer.strategy: ddp`, or leave the names out."
        )
    for teacher in () if cached else teachers:
        if isinstance(teacher, TeacherSpec) and teacher.quantization is not None:
            raise UserError(
                f"model.teacher.quantization: {teacher.quantization} weights can't be sharded; leave it out, "
                "cache the teacher's states (data.teacher_cache), or take `trainer.strategy: ddp`."
            )
        if isinstance(teacher, TeacherSpec) and teacher.offload:
            raise UserError(
                "model.teacher.offload: layers in the host's memory can't be sharded; leave it out (sharding "
                "saves as much), cache the teacher's states (data.teacher_cache), or take "
                "`trainer.strategy: ddp`."
            )
        if isinstance(teacher, TeacherSpec) and teacher.follow is not None:
            raise UserError(
                "model.teacher.follow: sharded weights can't follow the student's: take one device, or "
                "`trainer.strategy: ddp`."
            )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} copies the module, which can't be done with a "
                "sharded one; leave it out, or take `trainer.strategy: ddp`."
            )


def _foreign(name: str) -> UserError:
    return UserError(
        f"trainer.strategy: {name} shards models in a way in which heads can't be read outside of them; take "
        f"{_OURS}, or ddp."
    )
