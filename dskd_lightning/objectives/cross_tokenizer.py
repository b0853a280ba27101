"""What every objective across two vocabularies shares: maps, alignment metrics, partner positions."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dskd_lightning.errors import UserError
from dskd_lightning.functional import chunk_tokens, chunked_sum
from dskd_lightning.objectives._vocabulary import exact_maps
from dskd_lightning.objectives.base import Objective, ObjectiveOutput
from dskd_lightning.structures import Alignment, Head, ModelSpace, Ratio, Side

__all__ = ["CrossTokenizerObjective", "PairedObjective", "Pairs", "Partners", "shared_ids_alignment"]


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


class CrossTokenizerObjective(Objective):
    """Base of objectives whose two models may have different tokenizers.

    Args:
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``; cross-entropy runs on all of the
            student's response tokens, aligned or not.
        temperature: divides both sides' logits in KD.
        chunk_size: tokens whose logits exist at once; None takes it from a memory budget.
    """

    needs_alignment = True
    needs_vocabulary_map: bool = True
    """Whether ids of one vocabulary are looked up in the other; False only costs metrics."""
    reads_alignment: bool = True
    """Whether the loss depends on the alignment, rather than metrics alone."""

    student_to_teacher: Tensor | None
    teacher_to_student: Tensor | None

    def __init__(
        self, kd_ratio: float = 0.5, temperature: float = 2.0, chunk_size: int | None = None
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not 0.0 <= kd_ratio <= 1.0:
            raise UserError(f"kd_ratio of {name} must lie in [0, 1], not {kd_ratio}.")
        if temperature <= 0.0:
            raise UserError(f"temperature of {name} must be positive, not {temperature}.")
        if chunk_size is not None and chunk_size < 1:
            raise UserError(f"chunk_size of {name} must be at least 1, not {chunk_size}; or leave it out.")
        self.kd_ratio = kd_ratio
        self.temperature = temperature
        self.chunk_size = chunk_size
        # The partner of each id in the other vocabulary, -1 where it has none. Not part of a checkpoint.
        self.register_buffer("student_to_teacher", None, persistent=False)
        self.register_buffer("teacher_to_student", None, persistent=False)

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        """Look up which tokens both vocabularies hold.

        Raises:
            UserError: no teacher, or a tokenizer that is needed is missing.
        """
        name = type(self).__name__
        if teacher is None:
            raise UserError(f"{name} learns from a teacher: name one under model.teacher.")
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
        return self.chunk_size or chunk_tokens(max(student.head.vocab_size, teacher.head.vocab_size))

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
        tokens = student.labels.new_tensor(len(student))
        metrics = {}
        if alignment is not None:
            metrics["alignment_ratio"] = Ratio(tokens.new_tensor(len(alignment.pairs)), tokens)
            metrics["group_ratio"] = Ratio((alignment.student_group >= 0).sum(), tokens)
        if self.student_to_teacher is not None:
            known = self.student_to_teacher[student.labels] >= 0
            metrics["vocabulary_coverage"] = Ratio(known.sum(), tokens)
        if covered is not None:
            last = int(student.sequence[-1]) + 1 if len(student) else 0
            present, read = (
                torch.bincount(part, minlength=last) > 0
                for part in (student.sequence, student.sequence[covered])
            )
            metrics["unaligned_examples"] = Ratio((present & ~read).sum(), present.sum())
        return metrics


@dataclass(frozen=True)
class Partners:
    """Which teacher position each student position is compared with.

    Args:
        position: ``[n]``, a teacher position, -1 where there is none.
        extras: more tensors ``[n, ...]`` that the comparison reads, with a gradient or without.
    """

    position: Tensor
    extras: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Pairs:
    """Logits of the compared positions of one chunk.

    Args:
        teacher: ``[pairs, teacher vocab]``, no gradient, no temperature.
        student: ``[pairs, student vocab]``, with gradient.
        labels: ``[pairs]``, what the student must predict.
        extras: rows of `Partners.extras`.
    """

    teacher: Tensor
    student: Tensor
    labels: Tensor
    extras: tuple[Tensor, ...] = field(default=())


class PairedObjective(CrossTokenizerObjective):
    """Objectives that compare a student position with at most one teacher position.

    One pass over the student's positions in chunks: its head is read once for cross-entropy and
    KD, the teacher's only where there is a partner, and no logits outlive their chunk.
    """

    @abstractmethod
    def partners(self, student: Side, teacher: Side, alignment: Alignment) -> Partners:
        """Which positions are compared."""

    @abstractmethod
    def compare(self, pairs: Pairs) -> dict[str, Tensor]:
        """Terms of KD, each already weighted and summed over the pairs of a chunk."""

    def unpaired(self, student_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Terms of KD at positions without a partner; none unless overridden."""
        return {}

    def forward(
        self, student: Side, teacher: Side | None = None, alignment: Alignment | None = None
    ) -> ObjectiveOutput:
        assert teacher is not None
        partners = self.partners(student, teacher, self._alignment(student, teacher, alignment))
        position = partners.position
        # A row without a partner points at position 0, which nothing reads.
        hidden = teacher.hidden.detach()
        if not len(teacher):
            hidden = hidden.new_zeros(1, hidden.shape[1])
        inputs = (student.hidden, student.labels, hidden[position.clamp(min=0)], position, *partners.extras)
        heads = (student.head.weight, student.head.bias, teacher.head.weight, teacher.head.bias)

        def step(chunk: tuple[Any, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
            weight, bias, teacher_weight, teacher_bias = parameters
            return self._step(
                chunk,
                replace(student.head, weight=weight, bias=bias),
                replace(teacher.head, weight=teacher_weight, bias=teacher_bias),
            )

        loss, stats = chunked_sum(step, inputs, heads, chunk_size=self._chunk(student, teacher))
        tokens = student.labels.new_tensor(len(student))
        pairs = (position >= 0).sum()
        counts = {"student_accuracy": tokens, "student_entropy": tokens}
        names = ("teacher_accuracy", "teacher_entropy", "agreement")
        counts |= {name: pairs for name in names if name in stats}
        metrics = {name: Ratio(stats.pop(name), count) for name, count in counts.items()}
        metrics |= self.alignment_metrics(student, alignment, position >= 0)
        terms = {name: Ratio(total, tokens) for name, total in stats.items()}
        return ObjectiveOutput(loss, tokens, terms, metrics)

    def _step(self, chunk: tuple[Any, ...], student: Head, teacher: Head) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, labels, teacher_hidden, position, *extras = chunk
        paired = position >= 0
        logits = _wide(student.logits(hidden))
        ce = F.cross_entropy(logits, labels, reduction="sum")
        rows = paired.nonzero().squeeze(1)
        with torch.no_grad():
            teacher_logits = _wide(teacher.logits(teacher_hidden[rows]))
        pairs = Pairs(teacher_logits, logits[rows], labels[rows], tuple(extra[rows] for extra in extras))
        terms = self.compare(pairs)
        for name, value in self.unpaired(logits, labels.masked_fill(paired, -1)).items():
            terms[name] = terms[name] + value
        kd = torch.stack(list(terms.values())).sum()
        loss = (1 - self.kd_ratio) * ce + self.kd_ratio * kd
        stats = {"ce": ce, "kd": kd, **(terms if len(terms) > 1 else {})}
        with torch.no_grad():
            stats |= self._diagnose(logits, labels, pairs, rows)
        return loss, {name: value.detach() for name, value in stats.items()}

    def _diagnose(self, logits: Tensor, labels: Tensor, pairs: Pairs, rows: Tensor) -> dict[str, Tensor]:
        choice = logits.argmax(-1)
        stats = {"student_accuracy": (choice == labels).sum(), "student_entropy": _entropy(logits)}
        stats["teacher_entropy"] = _entropy(pairs.teacher)
        if self.teacher_to_student is not None:
            mapped = self.teacher_to_student[pairs.teacher.argmax(-1)]
            stats["teacher_accuracy"] = (mapped == pairs.labels).sum()
            stats["agreement"] = (mapped == choice[rows]).sum()
        return stats


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _entropy(logits: Tensor) -> Tensor:
    """Sum over rows of the entropy of ``softmax(logits)``, in nats."""
    return torch.special.entr(logits.softmax(-1)).sum()
