"""Teachers as a module holds them: whole, as the heads of cached states, or known by log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from dskd_lightning.errors import UserError
from dskd_lightning.models.absent import AbsentTeacher
from dskd_lightning.models.loaded import Loaded
from dskd_lightning.models.spec import TeacherSpec
from dskd_lightning.models.tokenizer import load_tokenizer
from dskd_lightning.objectives.base import Objective
from dskd_lightning.teacher_cache import TeacherHead, ensure_caches, ensure_log_probabilities
from dskd_lightning.training.following import Follower
from dskd_lightning.training.on_policy import OnPolicySettings

__all__ = ["ask_absent_teachers", "build_teacher", "cached_heads", "make_followers"]


def build_teacher(spec: TeacherSpec | Loaded) -> nn.Module:
    """A whole teacher, frozen; one that is known by its log-probabilities has no weights."""
    if isinstance(spec, TeacherSpec) and spec.absent:
        return AbsentTeacher(len(load_tokenizer(spec)))
    return cast("nn.Module", cast("Any", spec.build()[0]).requires_grad_(False).eval())


def cached_heads(
    trainer: L.Trainer | None,
    teachers: Sequence[TeacherSpec | Loaded],
    objectives: Sequence[Objective],
    on_policy: OnPolicySettings | None,
) -> list[TeacherHead | None] | None:
    """The teachers' heads, with complete caches behind them, or None to run whole teachers.

    Training builds what is missing; evaluation takes a cache where there is one.

    Raises:
        UserError: a cache can't hold what the objectives read.
    """
    datamodule: Any = None if trainer is None else cast("Any", trainer).datamodule
    if trainer is None or getattr(datamodule, "teacher_cache", None) is None:
        return None
    specs = [spec for spec in teachers if isinstance(spec, TeacherSpec)]
    if len(specs) < len(teachers):
        raise UserError(
            "data.teacher_cache: a cache is known by its teacher's files, which one in memory lacks; set "
            "it to null, or give a TeacherSpec."
        )
    if any(spec.follow is not None for spec in specs):
        raise UserError(
            "data.teacher_cache: a cache holds the states of one teacher, not of one that follows the "
            "student (model.teacher.follow); set it to null."
        )
    if on_policy is not None and trainer.state.fn == TrainerFn.FITTING:
        raise UserError(
            "data.teacher_cache: a cache holds the teacher's states on the dataset's responses, not on "
            "samples (model.on_policy); set it to null."
        )
    if any(o.needs_padded_statistics for o in objectives):
        raise UserError(
            "data.teacher_cache: the objective reads statistics of the padded layout, which a cache "
            "doesn't hold; set it to null or turn that option of the objective off."
        )
    fitting = trainer.state.fn == TrainerFn.FITTING
    learns = any(o.needs_teacher for o in objectives)
    stages = [s for s in datamodule.stages() if s != "predict" and (learns or s != "train")]
    return ensure_caches(datamodule, specs, stages, required=fitting)


def ask_absent_teachers(
    trainer: L.Trainer | None, teachers: Sequence[TeacherSpec | Loaded], objectives: Sequence[Objective]
) -> None:
    """Collect log-probabilities of the training data, where that is all to be known of a teacher.

    Raises:
        UserError: the data aren't an InstructionDataModule's, or something can't be asked.
    """
    specs = [spec for spec in teachers if isinstance(spec, TeacherSpec)]
    learns = any(objective.needs_teacher for objective in objectives)
    if not any(spec.absent for spec in specs) or not learns or trainer is None:
        return
    if trainer.state.fn != TrainerFn.FITTING:
        return
    datamodule: Any = cast("Any", trainer).datamodule
    if not hasattr(datamodule, "teacher_hidden") or len(specs) < len(teachers):
        raise UserError(
            "model.teacher: log-probabilities are collected for an InstructionDataModule whose teachers "
            "are all specs: train on one, with `datamodule=`."
        )
    ensure_log_probabilities(datamodule, specs)


def make_followers(
    student: nn.Module,
    specs: Sequence[TeacherSpec | Loaded],
    teachers: Sequence[nn.Module],
    objectives: Sequence[Objective],
) -> list[Follower]:
    """Of teachers whose weights follow the student's.

    Raises:
        UserError: one of them can't.
    """
    followers = []
    models = zip(specs, teachers, objectives, strict=False)
    for spec, teacher, objective in models:
        if not isinstance(spec, TeacherSpec) or spec.follow is None:
            continue
        if spec.quantization is not None:
            raise UserError(
                "model.teacher.follow: quantised weights can't follow the student's: leave quantization out."
            )
        if spec.offload:
            raise UserError(
                "model.teacher.follow: weights in the host's memory can't follow the student's: leave "
                "offload out."
            )
        follower = Follower(spec.follow, student, teacher, spec.source)
        head = id(cast("Any", teacher).get_output_embeddings().weight)
        named = dict(teacher.named_parameters(remove_duplicate=False))
        if objective.keeps_teacher_head and any(id(named[name]) == head for name in follower.names):
            raise UserError(
                f"model.teacher.follow: {type(objective).__name__} reads the teacher's head once, which "
                "would change: set student.freeze_embeddings or train adapters, or take DSKDObjective."
            )
        followers.append(follower)
    return followers
