"""What every objective on one shared vocabulary does: check its hyperparameters and its two models."""

from __future__ import annotations

from torch import Tensor

from dskd_lightning.alignment.vocabulary import PADDING_SHARE, vocabulary_difference
from dskd_lightning.errors import UserError
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.functional.divergences import Divergence, ForwardKL
from dskd_lightning.objectives.base import DistillationObjective
from dskd_lightning.structures import ModelSpace, Ratio, Side

__all__ = ["SameVocabularyObjective", "check_same_vocabulary", "ratios"]


class SameVocabularyObjective(DistillationObjective):
    """Base of objectives that compare student and teacher position by position, token by token.

    Args:
        divergence: of teacher and student; forward KL by default.
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        temperature: divides both sides' logits in the divergence.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.
    """

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
        """Check that both models read the same token ids.

        Raises:
            UserError: there is no teacher, or it has another vocabulary.
        """
        super().configure(student, teacher)
        assert teacher is not None
        check_same_vocabulary(type(self).__name__, student, teacher)

    def _pair(self, student: Side, teacher: Side | None) -> Side:
        """The teacher, which must have the student's positions.

        Raises:
            UserError: it is missing or has another number of response positions.
        """
        name = type(self).__name__
        if teacher is None:
            raise UserError(f"{name} needs the teacher's side of the batch.")
        if len(teacher) != len(student):
            raise UserError(
                f"{name} compares position by position, but the batch has {len(student)} response tokens of "
                f"the student and {len(teacher)} of the teacher: give both models the same template and "
                "length limits, or take an objective that aligns them."
            )
        return teacher


def check_same_vocabulary(name: str, student: ModelSpace, teacher: ModelSpace) -> None:
    """Raise unless the two models give every token the same id; padded heads may differ in size.

    Args:
        name: of the objective that asks.
        student: sizes and, if any, tokenizer of the student.
        teacher: of the teacher.

    Raises:
        UserError: the vocabularies differ.
    """
    remedy = "take an objective that works across vocabularies, such as DSKDCrossAttentionObjective."
    if student.tokenizer is not None and teacher.tokenizer is not None:
        found = vocabulary_difference(student.tokenizer, teacher.tokenizer)
        if found is not None:
            raise UserError(f"{name} needs one vocabulary, but {found}: {remedy}")
        return
    small, large = sorted((student.vocab_size, teacher.vocab_size))
    if large - small > PADDING_SHARE * large:
        raise UserError(
            f"{name} needs one vocabulary, but the student's head has {student.vocab_size} tokens and the "
            f"teacher's {teacher.vocab_size}: {remedy}"
        )


def ratios(stats: dict[str, Tensor], count: Tensor) -> dict[str, Ratio]:
    """Each sum over ``count``."""
    return {name: Ratio(total, count) for name, total in stats.items()}
