"""The two passes of dual-space distillation across vocabularies: student space and teacher space."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dskd_lightning.functional import Divergence, chunked_sum
from dskd_lightning.structures import Side

__all__ = ["SpaceWeights", "student_space", "teacher_space"]


@dataclass(frozen=True)
class SpaceWeights:
    """Factors on the sums of each term.

    Args:
        ce: of the student's cross-entropy.
        t2s_ce: of the projected teacher's cross-entropy.
        t2s_kd: of the divergence in the student's space.
    """

    ce: float | Tensor
    t2s_ce: float | Tensor
    t2s_kd: float | Tensor


def student_space(
    student: Side,
    projected: Tensor,
    targets: Tensor,
    divergence: Divergence,
    temperature: float,
    weights: SpaceWeights,
    *,
    chunk_size: int,
    only_agreeing: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the student, and the projected teacher read by the student's frozen head.

    Args:
        student: ``n`` positions.
        projected: ``[n, hidden]``, the teacher's hidden states in the student's space.
        targets: ``[n]``, what the projected teacher must predict; -1 keeps a position out of both
            t2s terms.
        divergence: of projected teacher (detached) and student.
        temperature: divides both sides' logits in the divergence.
        weights: of the three terms.
        chunk_size: positions whose logits exist at once.
        only_agreeing: the divergence runs where the projected teacher's argmax is the target.

    Returns:
        The weighted loss, and sums ``ce``, ``t2s_ce``, ``t2s_kd``, ``t2s_accuracy``, ``max_t2s_prob``,
        ``student_entropy``; per position ``student_choice`` ``[n]``.
    """

    def step(chunk: tuple[Any, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, labels, other, target = chunk
        head = replace(student.head, weight=parameters[0], bias=parameters[1])
        logits = _wide(head.logits(hidden))
        ce = F.cross_entropy(logits, labels, reduction="sum")
        rows = (target >= 0).nonzero().squeeze(1)
        target = target[rows]
        moved = _wide(head.detach().logits(other[rows]))
        t2s_ce = F.cross_entropy(moved, target, reduction="sum")
        hits = moved.argmax(-1) == target
        kept = hits.nonzero().squeeze(1) if only_agreeing else torch.arange(len(rows), device=rows.device)
        t2s_kd = divergence(moved.detach()[kept], logits[rows[kept]], temperature).sum()
        loss = weights.ce * ce + weights.t2s_ce * t2s_ce + weights.t2s_kd * t2s_kd
        with torch.no_grad():
            stats = {
                "ce": ce,
                "t2s_ce": t2s_ce,
                "t2s_kd": t2s_kd,
                "t2s_accuracy": hits.sum(),
                "max_t2s_prob": (moved.amax(-1) - moved.logsumexp(-1)).exp().sum(),
                "student_entropy": torch.special.entr(logits.softmax(-1)).sum(),
                "student_choice": logits.argmax(-1),
            }
        return loss, {name: value.detach() for name, value in stats.items()}

    inputs = (student.hidden, student.labels, projected, targets)
    return chunked_sum(step, inputs, (student.head.weight, student.head.bias), chunk_size=chunk_size)


def teacher_space(
    teacher: Side,
    projected: Tensor,
    divergence: Divergence,
    temperature: float,
    weight: float | Tensor,
    *,
    chunk_size: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The projected student read by the teacher's head, against the teacher.

    Args:
        teacher: ``m`` positions.
        projected: ``[m, teacher_hidden]``, the student's hidden states in the teacher's space.
        divergence: of teacher and projected student.
        temperature: divides both sides' logits.
        weight: factor on the sum.
        chunk_size: positions whose logits exist at once.

    Returns:
        The weighted loss, and sums ``s2t_kd``, ``s2t_accuracy``, ``s2t_agreement``,
        ``teacher_accuracy``, ``teacher_entropy``; per position ``teacher_choice`` ``[m]``.
    """
    head = teacher.head.detach()

    def step(chunk: tuple[Any, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, labels, other = chunk
        with torch.no_grad():
            logits = _wide(head.logits(hidden))
        moved = _wide(head.logits(other))
        s2t_kd = divergence(logits, moved, temperature).sum()
        with torch.no_grad():
            choice, moved_choice = logits.argmax(-1), moved.argmax(-1)
            stats = {
                "s2t_kd": s2t_kd,
                "s2t_accuracy": (moved_choice == labels).sum(),
                "s2t_agreement": (moved_choice == choice).sum(),
                "teacher_accuracy": (choice == labels).sum(),
                "teacher_entropy": torch.special.entr(logits.softmax(-1)).sum(),
                "teacher_choice": choice,
            }
        return weight * s2t_kd, {name: value.detach() for name, value in stats.items()}

    return chunked_sum(step, (teacher.hidden.detach(), teacher.labels, projected), (), chunk_size=chunk_size)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
