"""Cross-model attention: a soft alignment of two tokenisations (DSKD, arXiv 2406.17328)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dskd_lightning.alignment._padding import Rows
from dskd_lightning.described import Described
from dskd_lightning.errors import UserError
from dskd_lightning.projection import LinearProjector
from dskd_lightning.structures import Alignment, ModelSpace, Side

__all__ = ["AttentionMap", "CrossModelAttention"]


@dataclass(frozen=True)
class AttentionMap:
    """Attention between the response positions of two models, within each example.

    Args:
        t2s: ``[examples, n_max, m_max]``, what each student position reads from the teacher's
            positions; rows sum to 1, or to 0 where a position may read nothing.
        s2t: ``[examples, m_max, n_max]``, likewise from the teacher's positions.
        queries: ``[n, 2 teacher_hidden]``.
        keys: ``[m, 2 teacher_hidden]``, without gradient.
        student: layout of the student's positions.
        teacher: layout of the teacher's positions.
    """

    t2s: Tensor
    s2t: Tensor
    queries: Tensor
    keys: Tensor
    student: Rows
    teacher: Rows

    def to_student(self, values: Tensor) -> Tensor:
        """Teacher values ``[m, size]`` read at the student's positions, ``[n, size]``."""
        return self._read(self.t2s, self.teacher.pad(values), self.student)

    def to_teacher(self, values: Tensor) -> Tensor:
        """Student values ``[n, size]`` read at the teacher's positions, ``[m, size]``."""
        return self._read(self.s2t, self.student.pad(values), self.teacher)

    @staticmethod
    def _read(weights: Tensor, values: Tensor, rows: Rows) -> Tensor:
        return rows.flatten(weights.to(values.dtype) @ values)

    @property
    def student_reads(self) -> Tensor:
        """``[n]``, False where `causal` leaves a student position nothing to read."""
        return self.student.flatten(self.t2s.detach().sum(-1)) > 0

    @property
    def teacher_reads(self) -> Tensor:
        """``[m]``, False where `causal` leaves a teacher position nothing to read."""
        return self.teacher.flatten(self.s2t.detach().sum(-1)) > 0

    def pair_mass(self, pairs: Tensor) -> Tensor:
        """Student attention ``[pairs]`` on the teacher position of each exact pair ``[pairs, 2]``."""
        i, j = pairs.unbind(1)
        return self.t2s.detach()[self.student.sequence[i], self.student.place[i], self.teacher.place[j]]


def _rows(student: Side, teacher: Side) -> tuple[Rows, Rows]:
    """Both sides' layouts, from what the host knows of them where it does."""
    sides = student, teacher
    examples = max(
        side.extent[0] if side.extent is not None else int(side.sequence[-1]) + 1 if len(side) else 0
        for side in sides
    )
    first, second = (Rows.of(s.sequence, examples, s.extent and s.extent[1]) for s in sides)
    return first, second


class CrossModelAttention(Described, nn.Module):
    r"""Student tokens as queries, teacher tokens as keys.

    .. math:: Q = P_{query}([E_s(x); E_s(y)]), \quad K = [E_t(x); E_t(y)] / std, \quad
        A = Q K^T / \sqrt{2D}

    with ``softmax(A)`` for the student's and ``softmax(A^T)`` for the teacher's positions, in
    float32, each example by itself. Embeddings give no gradient.

    Args:
        causal: no position reads one whose target ends after its own target does. As published
            (False), a position also reads later ones, whose hidden states have seen its future.
        statistics: what standard deviations run over: the ``response`` positions, or the
            ``padded`` batch as published, in which all other positions count as token 0.
        scale_inputs: what ``P_query`` reads has unit root mean square in each dimension, see
            `LinearProjector`; False as published.
        byte_prior: strength ``s`` of the term ``s * log(overlap + 0.001)`` added to the scores, ``overlap``
            being the share of the student token's bytes that the teacher token covers: attention
            starts at the byte-exact alignment and learns to leave it. 0 as published.
        byte_prior_steps: optimiser steps over which the strength falls to 0, those of projector warm-up among
            them; None keeps it. Training batches where nothing calls `settle`.

    Raises:
        UserError: one of them is impossible, or would do nothing.
    """

    prior_steps: Tensor

    def __init__(
        self,
        causal: bool = False,
        statistics: Literal["response", "padded"] = "response",
        scale_inputs: bool = True,
        byte_prior: float = 0.0,
        byte_prior_steps: int | None = None,
    ) -> None:
        super().__init__()
        if byte_prior < 0:
            raise UserError(f"byte_prior of CrossModelAttention must not be negative, but is {byte_prior}.")
        if byte_prior_steps is not None and byte_prior_steps < 1:
            raise UserError(
                f"byte_prior_steps of CrossModelAttention must be at least 1, not {byte_prior_steps}; "
                "leave it out for a prior that stays."
            )
        if byte_prior_steps is not None and not byte_prior:
            raise UserError(
                "byte_prior_steps of CrossModelAttention does nothing without a prior: set byte_prior, or "
                "leave it out."
            )
        if statistics not in ("response", "padded"):
            raise UserError(
                f"statistics of CrossModelAttention must be 'response' or 'padded', not {statistics!r}."
            )
        self.causal = causal
        self.statistics = statistics
        self.scale_inputs = scale_inputs
        self.byte_prior = byte_prior
        self.byte_prior_steps = byte_prior_steps
        # How many the decay has seen; an integer, since a module in 16 bits couldn't count far.
        self.register_buffer("prior_steps", torch.zeros((), dtype=torch.int64))
        self._whole_step = self._read = False
        self.query: LinearProjector

    @property
    def needs_padded_statistics(self) -> bool:
        """Whether `Side.padded` of the teacher is read."""
        return self.statistics == "padded"

    def configure(self, student: ModelSpace, teacher: ModelSpace) -> None:
        """Make ``P_query``, from twice the student's to twice the teacher's hidden size."""
        inner, outer = (2 * space.embeddings.shape[1] for space in (student, teacher))
        self.query = LinearProjector(inner, outer, scale_inputs=self.scale_inputs)

    def forward(self, student: Side, teacher: Side, alignment: Alignment | None = None) -> AttentionMap:
        """Attention between all positions of two sides.

        Args:
            student: ``n`` positions.
            teacher: ``m`` positions.
            alignment: byte offsets, read where ``causal`` or with a byte prior.
        """
        rows_s, rows_t = _rows(student, teacher)
        weight = self.query.weight
        embedded = torch.cat([student.embeddings[student.ids], student.embeddings[student.labels]], -1)
        queries = self.query(embedded.detach())
        keys = self._keys(teacher).to(weight.dtype)
        scores = rows_s.pad(queries) @ rows_t.pad(keys).transpose(1, 2) / math.sqrt(keys.shape[-1])
        scores = scores if scores.dtype == torch.float64 else scores.float()
        if self.byte_prior:
            if alignment is None:
                raise ValueError("the byte prior of cross-model attention needs the alignment's byte offsets")
            overlap = _overlap(rows_s, rows_t, alignment).to(scores.dtype)
            scores = scores + self._strength() * (overlap + _PRIOR_EPSILON).log()
        both = rows_s.mask.unsqueeze(2) & rows_t.mask.unsqueeze(1)
        before, after = both, both
        if self.causal:
            if alignment is None:
                raise ValueError("causal cross-model attention needs the alignment's byte offsets")
            student_end, teacher_end = rows_s.pad(alignment.student_end), rows_t.pad(alignment.teacher_end)
            gap = student_end.unsqueeze(2) - teacher_end.unsqueeze(1)
            before, after = both & (gap >= 0), both & (gap <= 0)
        t2s = _masked_softmax(scores, before)
        s2t = _masked_softmax(scores.transpose(1, 2), after.transpose(1, 2))
        return AttentionMap(t2s, s2t, queries, keys, rows_s, rows_t)

    def measure_whole_step(self) -> None:
        """Let the prior decay once `settle` is called, the same for any number of micro-batches."""
        self._whole_step = True

    @torch.no_grad()
    def settle(self) -> None:
        """Count a step that was read, for the prior's decay."""
        self.prior_steps += self._read
        self._read = False

    @torch.no_grad()
    def _strength(self) -> float | Tensor:
        if self.byte_prior_steps is None:
            return self.byte_prior
        strength = self.byte_prior * (1 - self.prior_steps / self.byte_prior_steps).clamp(min=0)
        self._read |= self.training
        if not self._whole_step:
            self.settle()
        return strength

    @torch.no_grad()
    def teacher_values(self, teacher: Side, label_embedding: bool = True, keep_scale: bool = False) -> Tensor:
        """``h_t / std(h_t) + E_t(y) / std(E_t(y))`` ``[m, teacher_hidden]``, what ``P_t2s`` reads.

        Args:
            teacher: ``m`` positions.
            label_embedding: False leaves out the second term, which holds the very token to predict.
            keep_scale: times ``std(h_t)``: hidden states as the teacher's head reads them.
        """
        hidden = _wide(teacher.hidden)
        std = _std(hidden)
        if self.statistics == "padded":
            assert teacher.padded is not None
            std = teacher.padded.hidden_std.to(hidden)
        std = std.clamp(min=_tiny(hidden))
        values = hidden / std
        if label_embedding:
            targets = _wide(teacher.embeddings[teacher.labels])
            values = values + targets / self._std(targets, teacher)
        return values * std if keep_scale else values

    @torch.no_grad()
    def _keys(self, teacher: Side) -> Tensor:
        embedded = torch.cat([teacher.embeddings[teacher.ids], teacher.embeddings[teacher.labels]], -1)
        keys = _wide(embedded)
        return keys / self._std(keys, teacher)

    def _std(self, values: Tensor, teacher: Side) -> Tensor:
        """Standard deviation of embedded tokens ``[m, k * hidden]`` under `statistics`."""
        if self.statistics == "response":
            return _std(values).clamp(min=_tiny(values))
        if teacher.padded is None:
            raise UserError(
                "statistics='padded' of CrossModelAttention needs the teacher's whole padded batch, which a "
                "cache of response positions lacks: set statistics to 'response', or run the teacher."
            )
        other = teacher.padded.positions - len(teacher)
        filler = teacher.embeddings[0].to(values.dtype).repeat(values.shape[1] // teacher.embeddings.shape[1])
        size = teacher.padded.positions * values.shape[1]
        mean = (values.sum() + other * filler.sum()) / size
        squares = (values - mean).square().sum() + other * (filler - mean).square().sum()
        return (squares / (size - 1)).sqrt().clamp(min=_tiny(values))


def _overlap(student: Rows, teacher: Rows, alignment: Alignment) -> Tensor:
    """``[examples, n, m]``, share of each student token's bytes that each teacher token covers."""
    (first_s, last_s), (first_t, last_t) = (
        _byte_range(rows.pad(ends))
        for rows, ends in ((student, alignment.student_end), (teacher, alignment.teacher_end))
    )
    first = torch.maximum(first_s.unsqueeze(2), first_t.unsqueeze(1))
    last = torch.minimum(last_s.unsqueeze(2), last_t.unsqueeze(1))
    return (last - first).clamp(min=0) / (last_s - first_s).clamp(min=1).unsqueeze(2)


def _byte_range(ends: Tensor) -> tuple[Tensor, Tensor]:
    """First and last byte of each token ``[examples, tokens]``; padding, whose end is 0, has none."""
    return torch.nn.functional.pad(ends, (1, 0))[:, :-1], ends


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where ``mask``; rows that are masked throughout are 0."""
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights * mask


_PRIOR_EPSILON = 1e-3


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _std(values: Tensor) -> Tensor:
    """Unbiased standard deviation of all elements; 1 where there are too few."""
    return values.std() if values.numel() > 1 else values.new_ones(())


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny
