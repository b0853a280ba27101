"""Supervised fine-tuning: cross-entropy on the gold responses."""

from __future__ import annotations

from dskd_lightning.errors import UserError
from dskd_lightning.functional import fused_distillation
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.objectives.base import Objective, ObjectiveOutput
from dskd_lightning.structures import Alignment, Ratio, Side

__all__ = ["SFTObjective"]


class SFTObjective(Objective):
    """Cross-entropy on the response tokens; needs no teacher.

    Args:
        memory_budget_mb: MiB for the logits of a chunk of tokens.
    """

    needs_teacher = False

    def __init__(self, memory_budget_mb: float = DEFAULT_BUDGET_MB) -> None:
        super().__init__()
        if memory_budget_mb <= 0.0:
            raise UserError(f"memory_budget_mb of SFTObjective must be positive, not {memory_budget_mb}.")
        self.memory_budget_mb = memory_budget_mb

    def forward(
        self, student: Side, teacher: Side | None = None, alignment: Alignment | None = None
    ) -> ObjectiveOutput:
        fused = fused_distillation(
            student.hidden, student.head, labels=student.labels, memory_budget_mb=self.memory_budget_mb
        )
        tokens = student.labels.new_full((), len(student))
        hits = (fused.stats["student_choice"] == student.labels).sum()
        return ObjectiveOutput(
            fused.loss,
            tokens,
            {"ce": Ratio(fused.stats["ce"], tokens)},
            {
                "student_accuracy": Ratio(hits, tokens),
                "student_entropy": Ratio(fused.stats["student_entropy"], tokens),
            },
        )
