"""The two passes of dual-space distillation: one in the student's space, one in the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dskd_lightning.functional import (
    Divergence,
    chunk_tokens,
    fused_distillation,
    token_argmax,
    token_log_prob,
)
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.objectives.base import ObjectiveOutput
from dskd_lightning.structures import Ratio, Side

__all__ = ["SpaceWeights", "projector_alone", "student_space", "teacher_space"]


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
    memory_budget_mb: float = DEFAULT_BUDGET_MB,
    only_agreeing: bool = True,
    kd_mask: Tensor | None = None,
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
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk.
        only_agreeing: the divergence runs where the projected teacher's argmax is the target.
        kd_mask: ``[n]``, factor on each position's divergence, counted in ``t2s_kd``.

    Returns:
        The weighted loss, and sums ``ce``, ``t2s_ce``, ``t2s_kd``, ``t2s_accuracy`` (argmax is the
        target), ``max_t2s_prob``, ``student_entropy``; per position ``student_choice`` and
        ``t2s_choice``, the argmaxes ``[n]``.
    """
    mask = (targets >= 0).float()
    fused = fused_distillation(
        student.hidden,
        student.head,
        labels=student.labels,
        ce_weight=weights.ce,
        teacher_hidden=projected,
        teacher_head=student.head,
        teacher_labels=targets,
        teacher_ce_weight=weights.t2s_ce,
        divergence=divergence,
        temperature=temperature,
        kd_weight=weights.t2s_kd,
        kd_mask=mask if kd_mask is None else mask * kd_mask,
        agreeing_only=only_agreeing,
        memory_budget_mb=memory_budget_mb,
    )
    stats = fused.stats
    return fused.loss, {
        "ce": stats["ce"],
        "t2s_ce": stats["teacher_ce"],
        "t2s_kd": stats["kd"],
        "t2s_accuracy": (stats["teacher_choice"] == targets).sum(),
        "max_t2s_prob": stats["teacher_confidence"],
        "student_entropy": stats["student_entropy"],
        "student_choice": stats["student_choice"],
        "t2s_choice": stats["teacher_choice"],
    }


def projector_alone(
    student: Side,
    projected: Tensor,
    targets: Tensor,
    weight: float | Tensor,
    budget_mb: float,
    learnt: tuple[Tensor, int] | None = None,
) -> ObjectiveOutput:
    """The projected teacher's cross-entropy, the one term that reads no hidden state of the student.

    Args:
        student: whose head reads them, as it stands.
        projected: ``[m, hidden]``, the teacher's hidden states in the student's space.
        targets: ``[m]``, what they must predict; -1 leaves one out.
        weight: factor on the loss.
        budget_mb: MiB for the vocabulary-sized tensors of a chunk.
        learnt: sum and number of positions of another cross-entropy than that of ``targets``.
    """
    head, kept = student.head.detach(), targets >= 0
    count = kept.sum()
    if learnt is None:
        size = chunk_tokens(head.vocab_size, budget_mb, device=projected.device)
        log_prob = token_log_prob(projected, head, targets.clamp(min=0), chunk_size=size)
        total = -log_prob.where(kept, 0).sum()
    else:
        total, count = learnt[0], kept.new_full((), learnt[1], dtype=torch.long)
    right = (token_argmax(projected, head) == targets).sum()
    tokens = student.labels.new_full((), len(student))
    return ObjectiveOutput(
        weight * total,
        tokens,
        {"t2s_ce": Ratio(total.detach(), count)},
        {"t2s_agreement": Ratio(right, kept.sum())},
    )


def teacher_space(
    teacher: Side,
    projected: Tensor,
    divergence: Divergence,
    temperature: float,
    weight: float | Tensor,
    *,
    memory_budget_mb: float = DEFAULT_BUDGET_MB,
    kept: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The projected student read by the teacher's head, against the teacher.

    Args:
        teacher: ``m`` positions.
        projected: ``[m, teacher_hidden]``, the student's hidden states in the teacher's space.
        divergence: of teacher and projected student.
        temperature: divides both sides' logits.
        weight: factor on the sum.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk.
        kept: ``[m]`` of booleans, the positions that count; None for all.

    Returns:
        The weighted loss, and sums ``s2t_kd``, ``s2t_accuracy``, ``teacher_accuracy``, of all positions
        ``teacher_entropy``; per position ``teacher_choice`` and
        ``s2t_choice``, the argmaxes ``[m]``.
    """
    head = teacher.head.detach()
    fused = fused_distillation(
        projected,
        head,
        teacher_hidden=teacher.hidden.detach(),
        teacher_head=head,
        divergence=divergence,
        temperature=temperature,
        kd_weight=weight,
        kd_mask=None if kept is None else kept.float(),
        memory_budget_mb=memory_budget_mb,
    )
    choice, moved = fused.stats["teacher_choice"], fused.stats["student_choice"]
    labels = teacher.labels if kept is None else teacher.labels.where(kept, -1)
    return fused.loss, {
        "s2t_kd": fused.stats["kd"],
        "s2t_accuracy": (moved == labels).sum(),
        "teacher_accuracy": (choice == labels).sum(),
        "teacher_entropy": fused.stats["teacher_entropy"],
        "teacher_choice": choice,
        "s2t_choice": moved,
    }
