"""Distillation of the teacher's logits over one shared vocabulary."""

from __future__ import annotations

from dskd_lightning.functional import fused_distillation
from dskd_lightning.objectives._same_vocabulary import SameVocabularyObjective, ratios
from dskd_lightning.objectives.base import ObjectiveOutput
from dskd_lightning.structures import Alignment, Side

__all__ = ["LogitKDObjective"]


class LogitKDObjective(SameVocabularyObjective):
    """``KD = D(softmax(teacher logits / temperature) || softmax(student logits / temperature))``.

    Heads padded to different sizes are compared on their common prefix; cross-entropy runs on
    the student's whole vocabulary.

    Args:
        divergence: of teacher and student; forward KL by default.
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        temperature: divides both sides' logits in the divergence.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.
    """

    def forward(
        self, student: Side, teacher: Side | None = None, alignment: Alignment | None = None
    ) -> ObjectiveOutput:
        teacher = self._pair(student, teacher)
        ratio = self.kd_share(student)
        fused = fused_distillation(
            student.hidden,
            student.head,
            labels=student.labels,
            ce_weight=1 - ratio,
            teacher_hidden=teacher.hidden.detach(),
            teacher_head=teacher.head,
            divergence=self.divergence,
            temperature=self.temperature,
            kd_weight=ratio,
            memory_budget_mb=self.memory_budget_mb,
        )
        stats = fused.stats
        tokens = student.labels.new_full((), len(student))
        ours, theirs = stats["student_choice"], stats["teacher_choice"]
        metrics = {
            "student_accuracy": (ours == student.labels).sum(),
            "teacher_accuracy": (theirs == student.labels).sum(),
            "agreement": (ours == theirs).sum(),
            "student_entropy": stats["student_entropy"],
            "teacher_entropy": stats["teacher_entropy"],
        }
        terms = {"ce": stats["ce"], "kd": stats["kd"]}
        return ObjectiveOutput(fused.loss, tokens, ratios(terms, tokens), ratios(metrics, tokens))
