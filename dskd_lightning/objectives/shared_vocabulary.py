"""Distillation on the tokens that two vocabularies share."""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_lightning.functional import Divergence, ForwardKL
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.objectives._vocabulary import mutual_tokens
from dskd_lightning.objectives.paired import PairedObjective, Pairs, Partners
from dskd_lightning.structures import Alignment, ModelSpace, Side

__all__ = ["SharedVocabularyObjective", "pair_positions"]


def pair_positions(student: Side, alignment: Alignment) -> Tensor:
    """``[n]``, the teacher position of each student position's exact pair, or -1."""
    position = torch.full_like(student.labels, -1)
    position[alignment.pairs[:, 0]] = alignment.pairs[:, 1]
    return position


class SharedVocabularyObjective(PairedObjective):
    """A divergence on exact pairs, both distributions restricted to shared tokens and renormalised.

    End-of-sequence tokens count as shared, whatever their strings. The simplest method across
    vocabularies, and the one to beat where they overlap much.

    Args:
        divergence: compares the two restricted distributions; forward KL by default.
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        temperature: divides both sides' logits in KD.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.
    """

    student_ids: Tensor
    teacher_ids: Tensor

    def __init__(
        self,
        divergence: Divergence | None = None,
        kd_ratio: float = 0.5,
        temperature: float = 2.0,
        memory_budget_mb: float = DEFAULT_BUDGET_MB,
    ) -> None:
        super().__init__(kd_ratio, temperature, memory_budget_mb)
        self.divergence = ForwardKL() if divergence is None else divergence

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        super().configure(student, teacher)
        assert self.student_to_teacher is not None
        assert self.teacher_to_student is not None
        ids = mutual_tokens(self.student_to_teacher, self.teacher_to_student)
        self.register_buffer("student_ids", ids, persistent=False)
        self.register_buffer("teacher_ids", self.student_to_teacher[ids], persistent=False)

    def partners(self, student: Side, teacher: Side, alignment: Alignment) -> Partners:
        return Partners(pair_positions(student, alignment), most=len(alignment.pairs))

    def compare(self, pairs: Pairs) -> dict[str, Tensor]:
        teacher = pairs.teacher.index_select(-1, self.teacher_ids)
        student = pairs.student.index_select(-1, self.student_ids)
        each = self.divergence(student_logits=student, teacher_logits=teacher, temperature=self.temperature)
        return {"shared_kd": each}
