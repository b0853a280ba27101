"""Which arguments of the module go together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dskd_lightning.described import described
from dskd_lightning.errors import UserError
from dskd_lightning.models.loaded import Loaded
from dskd_lightning.models.spec import TeacherSpec
from dskd_lightning.objectives.base import Objective
from dskd_lightning.training.on_policy import OnPolicySettings

__all__ = ["check_arguments", "plain_arguments"]


def check_arguments(
    specs: Sequence[TeacherSpec | Loaded], objectives: Sequence[Objective], on_policy: OnPolicySettings | None
) -> None:
    """Check that teachers, objectives and settings go together.

    Raises:
        UserError: they don't.
    """
    teachers = len(specs)
    if teachers > 1 and len(objectives) != teachers:
        raise UserError(
            f"model.objective: {teachers} teachers need as many objectives, in the same order, "
            f"not {len(objectives)}; give a list."
        )
    if teachers <= 1 and len(objectives) != 1:
        raise UserError("model.objective: a list of objectives needs a list of as many teachers.")
    if on_policy is not None:
        on_policy.check()
    for objective in objectives:
        if objective.needs_teacher and not teachers:
            raise UserError(
                f"model.teacher: {type(objective).__name__} learns from a teacher; name one, "
                "or take SFTObjective."
            )
        if on_policy is not None and not objective.learns_from_samples:
            raise UserError(
                f"model.on_policy: {type(objective).__name__} learns nothing from the student's own "
                "samples; take an objective that follows a teacher, or leave on_policy out."
            )

    for spec, objective in zip(specs, objectives, strict=False):
        if not isinstance(spec, TeacherSpec) or not spec.absent:
            continue
        if spec.follow or spec.quantization or spec.adapter or spec.offload:
            raise UserError(
                "model.teacher: of a teacher known by its log-probabilities no weights are loaded: "
                "drop adapter, quantization, offload and follow, or endpoint and log_probabilities."
            )
        if objective.needs_teacher and not objective.learns_from_log_probabilities:
            raise UserError(
                f"model.objective: {type(objective).__name__} needs the teacher's hidden states, and "
                f"'{spec.source}' is known by log-probabilities alone: take TopKObjective (one "
                "vocabulary) or ALMObjective (any)."
            )
        if on_policy is not None:
            raise UserError(
                f"model.on_policy: of '{spec.source}' only log-probabilities of the data's responses are "
                "known, not of samples: leave on_policy out, or give a teacher that is here."
            )


def plain_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Those of ``given`` that can be told in plain types, from which `restored` makes them again."""
    plain: dict[str, Any] = {}
    for name, value in given.items():
        with suppress(UserError):
            plain[name] = described(value)
    return plain
