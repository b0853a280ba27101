"""Losses, diagnostics and gradients of a few rows of logits, written over those logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dskd_lightning.functional._softmax_rows import Scaling, Scratch, SoftmaxRows
from dskd_lightning.functional.divergences import Divergence

__all__ = ["LossWeights", "TileLosses", "tile_rows"]

# Float32 bytes of one tile of logits on a CPU: a handful of such tensors shares the last-level cache.
_TILE_BYTES = 2 * 2**20


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
        scratch: Scratch,
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
            scratch: buffers to work in, the same for every tile.
            student_grad: overwrite ``student``.
            teacher_grad: overwrite ``teacher``.
        """
        if student.shape[0] == 0:
            return self._empty(student, teacher, labels, teacher_labels)
        s = SoftmaxRows(student, self.student_scale, self.masked, scratch, "s")
        stats = {"student_choice": s.choice}
        loss = s.logits.new_zeros(())
        gradient: Tensor | None = None
        if teacher is not None:
            t = SoftmaxRows(teacher, self.teacher_scale, self.masked, scratch, "t")
            stats["teacher_choice"] = t.choice
            if self.divergence is not None:
                mask = kd_mask
                if self.agreeing_only and teacher_labels is not None:
                    agrees = torch.eq(t.choice, teacher_labels).to(loss.dtype)
                    mask = agrees if mask is None else mask * agrees
                stats["kd"], gradient = self._divergence(t, s, mask, student_grad)
                loss = loss + self.weights.kd * stats["kd"]
            stats["teacher_entropy"], confidence = t.entropy().sum(), t.total.reciprocal()
            if teacher_labels is not None:
                confidence = confidence * (teacher_labels >= 0)
                stats["teacher_ce"] = t.cross_entropy(teacher_labels)
                loss = loss + self.weights.teacher_ce * stats["teacher_ce"]
                if teacher_grad:
                    t.write(t.cross_entropy_grad(teacher_labels, self.weights.teacher_ce))
            stats["teacher_confidence"] = confidence.sum()
        if labels is not None:
            stats["ce"], stats["student_entropy"] = s.cross_entropy(labels), s.entropy().sum()
            loss = loss + self.weights.ce * stats["ce"]
            if student_grad:
                d_ce = s.cross_entropy_grad(labels, self.weights.ce)
                if gradient is not None:
                    d_ce[:, : gradient.shape[1]].add_(gradient)
                gradient = d_ce
        if student_grad:
            s.write(gradient)
        stats["loss"] = loss
        return stats

    def _divergence(
        self, t: SoftmaxRows, s: SoftmaxRows, mask: Tensor | None, need: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sum over the rows, and the weighted gradient to the student's logits."""
        divergence, temperature = self.divergence, self.temperature
        assert divergence is not None
        shared = min(t.logits.shape[1], s.logits.shape[1])
        whole = t.logits.shape[1] == s.logits.shape[1]
        if whole and divergence.has_closed_form and not self.masked:
            (log_p, p), (log_q, q) = t.at(temperature), s.at(temperature)
            value, gradient = divergence.value_and_grad_of(
                log_p=log_p, log_q=log_q, p=p, q=q, temperature=temperature
            )
        else:
            value, gradient = divergence.value_and_grad(
                s.logits[:, :shared], t.logits[:, :shared], temperature, self.masked
            )
        total = (value if mask is None else value * mask).sum()
        if not need:
            return total, None
        return total, gradient.mul_(
            self.weights.kd if mask is None else (self.weights.kd * mask).unsqueeze(-1)
        )

    def _empty(
        self, s: Tensor, t: Tensor | None, labels: Tensor | None, teacher_labels: Tensor | None
    ) -> dict[str, Tensor]:
        zero = s.new_zeros((), dtype=torch.promote_types(s.dtype, torch.float32))
        names = ["loss"]
        none = torch.zeros(0, dtype=torch.long, device=s.device)
        if labels is not None:
            names += ["ce", "student_entropy"]
        if t is not None:
            names += ["teacher_entropy", "teacher_confidence"]
            names += ["teacher_ce"] * (teacher_labels is not None) + ["kd"] * (self.divergence is not None)
        choices = {"student_choice": none} | ({} if t is None else {"teacher_choice": none})
        return dict.fromkeys(names, zero) | choices
