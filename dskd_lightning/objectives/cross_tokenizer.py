"""What every objective across two vocabularies shares: maps, alignment metrics, partner positions."""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.functional import chunk_tokens
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.objectives._vocabulary import exact_maps
from dskd_lightning.objectives.base import DistillationObjective
from dskd_lightning.structures import Alignment, ModelSpace, Ratio, Side

__all__ = ["CrossTokenizerObjective", "shared_ids_alignment"]


def shared_ids_alignment(student: Side, teacher: Side) -> Alignment:
    """The alignment of two sides that read the same ids: every position with itself.

    Raises:
        ValueError: their labels differ.
    """
    if len(student) != len(teacher) or not torch.equal(student.labels, teacher.labels):
        raise ValueError("without an alignment, student and teacher must predict the same token ids")
    positions = torch.arange(len(student), device=student.labels.device)
    starts = torch.searchsorted(student.sequence.contiguous(), student.sequence.contiguous())
    ends = positions - starts + 1
    return Alignment(positions, positions, ends, ends, positions.unsqueeze(1).expand(-1, 2), len(student))


class CrossTokenizerObjective(DistillationObjective):
    """Base of objectives whose two models may have different tokenizers.

    Args:
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``; cross-entropy runs on all of the
            student's response tokens, aligned or not.
        temperature: divides both sides' logits in KD.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.
    """

    needs_vocabulary_map: bool = True
    """Whether ids of one vocabulary are looked up in the other; False only costs metrics."""
    reads_alignment: bool = True
    """Whether the loss depends on the alignment, rather than metrics alone."""

    vocabulary_copies: int = 12
    """Float32 tensors of a chunk's vocabulary size alive at once, which the budget must hold."""

    student_to_teacher: Tensor | None
    teacher_to_student: Tensor | None

    def __init__(
        self, kd_ratio: float = 0.5, temperature: float = 2.0, memory_budget_mb: float = DEFAULT_BUDGET_MB
    ) -> None:
        super().__init__(kd_ratio, temperature, memory_budget_mb)
        # The partner of each id in the other vocabulary, -1 where it has none. Not part of a checkpoint.
        self.register_buffer("student_to_teacher", None, persistent=False)
        self.register_buffer("teacher_to_student", None, persistent=False)

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        """Look up which tokens both vocabularies hold.

        Raises:
            UserError: no teacher, or a tokenizer that is needed is missing.
        """
        super().configure(student, teacher)
        assert teacher is not None
        name = type(self).__name__
        if student.tokenizer is None or teacher.tokenizer is None:
            if self.needs_vocabulary_map:
                raise UserError(f"{name} maps one vocabulary to the other: give both models a tokenizer.")
            return
        self.student_to_teacher, self.teacher_to_student = exact_maps(student, teacher)
        if self.needs_vocabulary_map and not bool((self.student_to_teacher >= 0).any()):
            raise UserError(
                f"{name}: the two vocabularies share no token; take ULDObjective or ALMObjective, "
                "which need none."
            )

    def _chunk(self, student: Side, teacher: Side) -> int:
        vocab = max(student.head.vocab_size, teacher.head.vocab_size)
        return chunk_tokens(
            vocab, self.memory_budget_mb, copies=self.vocabulary_copies, device=student.hidden.device
        )

    def _alignment(self, student: Side, teacher: Side, alignment: Alignment | None) -> Alignment:
        if alignment is not None:
            return alignment
        if self.reads_alignment:
            return shared_ids_alignment(student, teacher)
        none_s, none_t = (torch.full_like(side.labels, -1) for side in (student, teacher))
        return Alignment(none_s, none_t, none_s, none_t, student.labels.new_empty(0, 2), 0)

    def alignment_metrics(
        self, student: Side, alignment: Alignment | None, covered: Tensor | None = None
    ) -> dict[str, Ratio]:
        """Metrics that need no logits.

        Args:
            student: the student's positions.
            alignment: None leaves out ``alignment_ratio``.
            covered: ``[n]``, positions that the KD term read, for ``unaligned_examples``.

        Returns:
            ``alignment_ratio`` (student tokens in an exact pair), ``group_ratio`` (in any group),
            ``vocabulary_coverage`` (student tokens with a counterpart in the teacher's vocabulary),
            ``unaligned_examples`` (examples none of whose positions KD read).
        """
        tokens = student.labels.new_full((), len(student))
        metrics = {}
        if alignment is not None:
            metrics["alignment_ratio"] = Ratio(tokens.new_full((), len(alignment.pairs)), tokens)
            metrics["group_ratio"] = Ratio((alignment.student_group >= 0).sum(), tokens)
        if self.student_to_teacher is not None:
            known = self.student_to_teacher[student.labels] >= 0
            metrics["vocabulary_coverage"] = Ratio(known.sum(), tokens)
        if covered is not None:
            first = torch.ones_like(covered)
            first[1:] = student.sequence[1:] != student.sequence[:-1]
            read = tokens.new_zeros(len(student)).index_add(0, first.cumsum(0) - 1, covered.to(tokens.dtype))
            examples = first.sum()
            metrics["unaligned_examples"] = Ratio(examples - (read > 0).sum(), examples)
        return metrics
