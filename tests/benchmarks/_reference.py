"""DSKD's loss computed plainly: every head's logits in full, softmax and log-softmax in float32.

This is the computation of arXiv 2406.17328's implementation, written anew for the benchmarks: what
a straightforward PyTorch program does and what the fused passes replace.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over positions whose label isn't negative."""
    log_probs = torch.log_softmax(logits, -1, dtype=torch.float32)
    picked = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return -(picked * (labels >= 0)).sum()


def forward_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Sum of KL(teacher || student) over positions whose label isn't negative."""
    probs = torch.softmax(teacher / temperature, -1, dtype=torch.float32)
    teacher_log = torch.log_softmax(teacher / temperature, -1, dtype=torch.float32)
    student_log = torch.log_softmax(student / temperature, -1, dtype=torch.float32)
    return ((probs * (teacher_log - student_log)).sum(-1) * (labels >= 0)).sum()


def plain_dskd(
    student_hidden: Tensor,
    student_logits: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_logits: Tensor,
    teacher_weight: Tensor,
    t2s: nn.Module,
    s2t: nn.Module,
    labels: Tensor,
    ratio: float,
    temperature: float,
) -> Tensor:
    """``(1 - ratio) * CE + ratio * (t2s_ce + t2s_kd + s2t_kd)``, a sum over the labelled positions.

    Args:
        student_hidden: ``[..., hidden]``, with a gradient.
        student_logits: ``[..., vocab]``, of the student's own head.
        student_weight: ``[vocab, hidden]``, the student's head.
        teacher_hidden: ``[..., teacher_hidden]``.
        teacher_logits: ``[..., vocab]``, without a gradient.
        teacher_weight: ``[vocab, teacher_hidden]``, the teacher's head.
        t2s: projector of teacher states.
        s2t: projector of student states.
        labels: ``[...]``, negative where nothing is predicted.
        ratio: share of distillation in the loss.
        temperature: divides both sides' logits in the divergences.
    """
    moved = t2s(teacher_hidden).to(student_weight.dtype) @ student_weight.detach().T
    ce, t2s_ce = cross_entropy(student_logits, labels), cross_entropy(moved, labels)
    t2s_kd = forward_kl(student_logits, moved.detach(), labels, temperature)
    back = s2t(student_hidden).to(teacher_weight.dtype) @ teacher_weight.T
    s2t_kd = forward_kl(back, teacher_logits, labels, temperature)
    return (1 - ratio) * ce + ratio * (t2s_ce + t2s_kd + s2t_kd)
