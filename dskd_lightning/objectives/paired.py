"""Objectives that compare each student position with at most one teacher position."""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from dskd_lightning.functional.paired_logits import paired_logit_sum
from dskd_lightning.objectives.base import ObjectiveOutput
from dskd_lightning.objectives.cross_tokenizer import CrossTokenizerObjective
from dskd_lightning.structures import Alignment, Ratio, Side

__all__ = ["PairedObjective", "Pairs", "Partners"]


@dataclass(frozen=True)
class Partners:
    """Which teacher position each student position is compared with.

    Args:
        position: ``[n]``, a teacher position, -1 where there is none.
        extras: more tensors ``[n, ...]`` that the comparison reads, with a gradient or without.
        most: at least as many as positions have a partner, where the host knows such a number; None waits for
            the device to count them.
    """

    position: Tensor
    extras: tuple[Tensor, ...] = ()
    most: int | None = None


@dataclass(frozen=True)
class Pairs:
    """Logits of the compared positions of one chunk, and of some that aren't, whose terms don't count.

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

    diagnostics: tuple[str, ...] = ()
    """Names of what `diagnose` returns."""

    @abstractmethod
    def partners(self, student: Side, teacher: Side, alignment: Alignment) -> Partners:
        """Which positions are compared."""

    @abstractmethod
    def compare(self, pairs: Pairs) -> dict[str, Tensor]:
        """Terms of KD ``[pairs]``, each already weighted, at the pairs of a chunk."""

    def diagnose(self, pairs: Pairs) -> dict[str, Tensor]:
        """More metrics ``[pairs]`` at the pairs of a chunk, logged as means; named in `diagnostics`."""
        return {}

    def unpaired(self, student_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Summed terms of KD at positions without a partner, by their labels (-1 at others); none unless
        overridden.

        Not called on the student's own samples, whose labels are nothing to learn.
        """
        return {}

    def forward(
        self, student: Side, teacher: Side | None = None, alignment: Alignment | None = None
    ) -> ObjectiveOutput:
        assert teacher is not None
        partners = self.partners(student, teacher, self._alignment(student, teacher, alignment))
        position = partners.position
        loss, stats = paired_logit_sum(
            functools.partial(self._step, student.sampled),
            (student.hidden, student.head),
            (teacher.hidden.detach(), teacher.head.detach()),
            position,
            (student.labels, *partners.extras),
            most=partners.most,
            memory_budget_mb=self.memory_budget_mb,
            copies=self.vocabulary_copies,
        )
        tokens = student.labels.new_full((), len(student))
        pairs = (position >= 0).sum()
        counts = {"student_accuracy": tokens, "student_entropy": tokens}
        names = ("teacher_accuracy", "teacher_entropy", "agreement", *self.diagnostics)
        counts |= {name: pairs for name in names if name in stats}
        metrics = {name: Ratio(stats.pop(name), count) for name, count in counts.items()}
        metrics |= self.alignment_metrics(student, alignment, position >= 0)
        terms = {name: Ratio(total, tokens) for name, total in stats.items()}
        return ObjectiveOutput(loss, tokens, terms, metrics)

    def _step(
        self,
        sampled: bool,
        logits: Tensor,
        teacher_logits: Tensor,
        paired: Tensor,
        inputs: tuple[Tensor, ...],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        labels, *extras = inputs
        ce = F.cross_entropy(logits, labels, reduction="sum")
        first = slice(len(paired))
        pairs = Pairs(teacher_logits, logits[first], labels[first], tuple(extra[first] for extra in extras))
        terms = _sums(self.compare(pairs), paired)
        if not sampled:
            others = labels.masked_fill(F.pad(paired, (0, len(labels) - len(paired))), -1)
            for name, value in self.unpaired(logits, others).items():
                terms[name] = terms[name] + value
        kd = torch.stack(list(terms.values())).sum()
        ratio = 1.0 if sampled else self.kd_ratio
        loss = (1 - ratio) * ce + ratio * kd
        stats = {"ce": ce, "kd": kd, **(terms if len(terms) > 1 else {})}
        with torch.no_grad():
            choice = logits.argmax(-1)
            stats |= {"student_accuracy": (choice == labels).sum(), "student_entropy": _entropy(logits).sum()}
            stats |= _sums(self._diagnose(choice[first], pairs) | self.diagnose(pairs), paired)
        return loss, {name: value.detach() for name, value in stats.items()}

    def _diagnose(self, choice: Tensor, pairs: Pairs) -> dict[str, Tensor]:
        stats = {"teacher_entropy": _entropy(pairs.teacher)}
        if self.teacher_to_student is not None:
            mapped = self.teacher_to_student[pairs.teacher.argmax(-1)]
            stats |= {"teacher_accuracy": mapped == pairs.labels, "agreement": mapped == choice}
        return stats


def _sums(values: dict[str, Tensor], paired: Tensor) -> dict[str, Tensor]:
    """Values ``[pairs]`` summed where there is a pair."""
    return {name: value.where(paired, 0).sum() for name, value in values.items()}


def _entropy(logits: Tensor) -> Tensor:
    """``[rows]``, entropy of ``softmax(logits)``, in nats."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)  # 0 where p is 0
