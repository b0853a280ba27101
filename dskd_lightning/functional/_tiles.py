"""Losses, diagnostics and gradients of a few rows of logits, written over those logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dskd_lightning.functional.divergences import Divergence

__all__ = ["LossWeights", "TileLosses", "tile_rows"]

# Float32 bytes of one tile of logits on a CPU: a handful of such tensors shares the last-level cache.
_TILE_BYTES = 4 * 2**20

Scaling = tuple[float, float | None]


def tile_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits that are worked on at once: what the cache holds on a CPU, all of them elsewhere."""
    return max(1, _TILE_BYTES // (4 * vocab_size)) if device.type == "cpu" else 2**30


@dataclass(frozen=True)
class LossWeights:
    """Factors on the sums of the three terms."""

    ce: float | Tensor = 1.0
    teacher_ce: float | Tensor = 1.0
    kd: float | Tensor = 1.0


@dataclass(frozen=True)
class TileLosses:
    """The losses of :func:`~dskd_lightning.functional.fused_distillation.fused_distillation` on one tile.

    Args:
        weights: factors on the three terms.
        divergence: of teacher and student, or None.
        temperature: divides both logits in the divergence.
        agreeing_only: the divergence counts only where the teacher's argmax is its label.
        masked: whether logits may be -inf.
        student_scale: ``(scale, softcap)`` of the student's head.
        teacher_scale: of the teacher's head.
    """

    weights: LossWeights
    divergence: Divergence | None
    temperature: float
    agreeing_only: bool
    masked: bool
    student_scale: Scaling
    teacher_scale: Scaling

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        teacher_labels: Tensor | None,
        kd_mask: Tensor | None,
        *,
        student_grad: bool,
        teacher_grad: bool,
    ) -> dict[str, Tensor]:
        """Statistics and the weighted ``loss``; where wanted, logits are overwritten by their gradients.

        Args:
            student: ``[rows, vocab]``, products of hidden states and head weight plus bias.
            teacher: ``[rows, teacher_vocab]``, likewise.
            labels: ``[rows]``, negative where there is none.
            teacher_labels: ``[rows]``, likewise.
            kd_mask: ``[rows]``, factor on each row's divergence.
            student_grad: overwrite ``student``.
            teacher_grad: overwrite ``teacher``.
        """
        s = _scaled(student, self.student_scale)
        t = None if teacher is None else _scaled(teacher, self.teacher_scale)
        stats: dict[str, Tensor] = {}
        loss = s.new_zeros(())
        gradient: Tensor | None = None
        if s.shape[0] == 0:
            return self._empty(s, t, labels, teacher_labels)
        if t is not None:
            confidence, choice = t.max(-1)
            stats["teacher_choice"] = choice
            if self.divergence is not None:
                mask = kd_mask
                if self.agreeing_only and teacher_labels is not None:
                    agrees = torch.eq(choice, teacher_labels).to(s.dtype)
                    mask = agrees if mask is None else mask * agrees
                kd, gradient = self._divergence(t, s, mask, student_grad)
                stats["kd"] = kd
                loss = loss + self.weights.kd * kd
            teacher_ce, teacher_entropy, log_norm, d_teacher = self._cross_entropy(
                t, teacher_labels, self.weights.teacher_ce, teacher_grad
            )
            stats["teacher_entropy"] = teacher_entropy
            confidence = (confidence - log_norm).exp()
            if teacher_labels is not None:
                confidence = confidence * (teacher_labels >= 0)
            stats["teacher_confidence"] = confidence.sum()
            if teacher_labels is not None:
                stats["teacher_ce"] = teacher_ce
                loss = loss + self.weights.teacher_ce * teacher_ce
            if d_teacher is not None and teacher is not None:
                _write(teacher, d_teacher, t, self.teacher_scale)
        stats["student_choice"] = s.argmax(-1)
        if labels is not None:
            ce, stats["student_entropy"], _, d_student = self._cross_entropy(
                s, labels, self.weights.ce, student_grad
            )
            stats["ce"] = ce
            loss = loss + self.weights.ce * ce
            if d_student is not None:
                if gradient is not None:
                    d_student[:, : gradient.shape[1]].add_(gradient)
                gradient = d_student
        if student_grad:
            _write(student, gradient, s, self.student_scale)
        stats["loss"] = loss
        return stats

    def _divergence(
        self, t: Tensor, s: Tensor, mask: Tensor | None, need: bool
    ) -> tuple[Tensor, Tensor | None]:
        assert self.divergence is not None
        shared = min(t.shape[1], s.shape[1])
        t, s = t[:, :shared], s[:, :shared]
        if not need:
            value = self.divergence(t, s, self.temperature)
            return (value if mask is None else value * mask).sum(), None
        value, gradient = self.divergence.value_and_grad(t, s, self.temperature, self.masked)
        factor = self.weights.kd if mask is None else (self.weights.kd * mask).unsqueeze(-1)
        return (value if mask is None else value * mask).sum(), gradient.mul_(factor)

    def _cross_entropy(
        self, logits: Tensor, labels: Tensor | None, weight: float | Tensor, need: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``(sum of CE, sum of entropies, log normaliser [rows], weighted gradient)``."""
        log_norm = logits.logsumexp(-1, keepdim=True)
        log_prob = logits - log_norm
        prob = log_prob.exp()
        if self.masked:
            log_prob.masked_fill_(log_prob.isneginf(), 0.0)
        entropy = -torch.linalg.vecdot(prob, log_prob).sum()
        if labels is None:
            return entropy.new_zeros(()), entropy, log_norm.squeeze(-1), None
        valid = (labels >= 0).to(logits.dtype).unsqueeze(-1)
        index = labels.clamp(min=0).unsqueeze(-1)
        ce = ((log_norm - logits.gather(-1, index)) * valid).sum()
        if not need:
            return ce, entropy, log_norm.squeeze(-1), None
        prob.scatter_add_(-1, index, prob.new_full((), -1.0).expand_as(index))
        return ce, entropy, log_norm.squeeze(-1), prob.mul_(valid * weight)

    def _empty(
        self, s: Tensor, t: Tensor | None, labels: Tensor | None, teacher_labels: Tensor | None
    ) -> dict[str, Tensor]:
        zero = s.new_zeros(())
        names = ["loss"]
        none = torch.zeros(0, dtype=torch.long, device=s.device)
        if labels is not None:
            names += ["ce", "student_entropy"]
        if t is not None:
            names += ["teacher_entropy", "teacher_confidence"]
            names += ["teacher_ce"] * (teacher_labels is not None) + ["kd"] * (self.divergence is not None)
        choices = {"student_choice": none} | ({} if t is None else {"teacher_choice": none})
        return dict.fromkeys(names, zero) | choices


def _scaled(products: Tensor, scaling: Scaling) -> Tensor:
    """Float32 (or 64) logits ``softcap(scale * products)``."""
    scale, softcap = scaling
    logits = products if products.dtype == torch.float64 else products.float()
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _write(products: Tensor, gradient: Tensor | None, logits: Tensor, scaling: Scaling) -> None:
    """Overwrite ``products`` by the gradient to them, given the gradient to the logits."""
    if gradient is None:
        products.zero_()
        return
    scale, softcap = scaling
    if softcap is not None:
        gradient = gradient * (1 - (logits / softcap).square())
    if scale != 1.0:
        gradient = gradient * scale
    if gradient.shape[1] < products.shape[1]:
        products[:, gradient.shape[1] :] = 0
    products[:, : gradient.shape[1]] = gradient
