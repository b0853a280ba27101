"""X-Token (arXiv 2605.21699): distributions compared through a sparse map of the vocabularies."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.functional.precision import has_sparse
from dskd_lightning.objectives._vocabulary import sparse_projection
from dskd_lightning.objectives.gold import GOLDObjective, group_starts
from dskd_lightning.objectives.paired import PairedObjective, Pairs, Partners
from dskd_lightning.structures import Alignment, ModelSpace, Side

__all__ = ["XTokenHybridObjective", "XTokenProjectionObjective"]


class _SparseProduct(torch.autograd.Function):
    """``q @ matrix.T`` in q's own type, forward and backward: CUDA has no sparse products in half precision.

    The gradient is asked for inside of autocast, which would put `torch.sparse.mm`'s own backward into half.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, q: Tensor) -> Tensor:
        ctx.matrix = matrix
        return _SparseProduct._product(matrix, q)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor]:
        return None, _SparseProduct._product(ctx.matrix.t(), upstream[0].to(ctx.matrix.dtype))

    @staticmethod
    def _product(matrix: Tensor, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            return torch.sparse.mm(matrix, rows.T).T


class XTokenProjectionObjective(PairedObjective):
    """P-KL: the student's distribution projected into the teacher's vocabulary, KL there.

    ``q W`` with ``W [student vocab, teacher vocab]`` of string rules: 1 at an exact match, and a
    token that the teacher spells in several pieces spread over them. Compared at the first
    position of each byte group, where both have read the same text. Teacher tokens that ``W``
    never reaches would make the KL infinite: both sides are renormalised on the reached ones, and
    the teacher's mass there is logged as ``reached_mass``.

    Args:
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        temperature: divides both sides' logits in KD.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.
    """

    reached: Tensor
    diagnostics = ("reached_mass",)
    vocabulary_copies = 14  # the projected distribution beside both sides'

    def __init__(
        self, kd_ratio: float = 0.5, temperature: float = 1.0, memory_budget_mb: float = DEFAULT_BUDGET_MB
    ) -> None:
        super().__init__(kd_ratio, temperature, memory_budget_mb)

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        super().configure(student, teacher)
        assert teacher is not None
        rows, columns, weights = sparse_projection(student, teacher)
        reached, slots = columns.unique(return_inverse=True)
        size = (len(reached), student.vocab_size)
        # Coalesced on the CPU: the device may lack sparse tensors.
        transposed = torch.sparse_coo_tensor(
            torch.stack([slots, rows]).cpu(), weights.cpu(), size, device="cpu", check_invariants=False
        ).coalesce()
        self.register_buffer("reached", reached, persistent=False)
        self.register_buffer("projection_index", transposed.indices().to(rows.device), persistent=False)
        self.register_buffer("projection_weight", transposed.values().to(rows.device), persistent=False)

    def partners(self, student: Side, teacher: Side, alignment: Alignment) -> Partners:
        return Partners(group_starts(student, alignment.starts), most=alignment.groups)

    def compare(self, pairs: Pairs) -> dict[str, Tensor]:
        q = (pairs.student / self.temperature).softmax(-1)
        projected = self._project(q)
        tiny = torch.finfo(q.dtype).tiny
        log_q = projected.clamp(min=tiny).log()
        log_q = log_q - log_q.logsumexp(-1, keepdim=True)
        log_p = (pairs.teacher / self.temperature).index_select(-1, self.reached).log_softmax(-1)
        return {"projected_kl": (log_p.exp() * (log_p - log_q)).sum(-1)}

    def _project(self, q: Tensor) -> Tensor:
        """``q W`` ``[pairs, reached]`` of probabilities ``[pairs, student vocab]``."""
        index, weights = self.get_buffer("projection_index"), self.get_buffer("projection_weight").to(q)
        size = (len(self.reached), q.shape[1])
        if not has_sparse(q.device):
            slots, rows = index.unbind(0)
            spread = q.index_select(1, rows) * weights
            return q.new_zeros(len(q), size[0]).index_add(1, slots, spread)
        matrix = torch.sparse_coo_tensor(index, weights, size, is_coalesced=True, check_invariants=False)
        return cast("Tensor", _SparseProduct.apply(matrix, q))

    def diagnose(self, pairs: Pairs) -> dict[str, Tensor]:
        mass = (pairs.teacher / self.temperature).softmax(-1).index_select(-1, self.reached).sum(-1)
        return {"reached_mass": mass}


class XTokenHybridObjective(GOLDObjective):
    """H-KL: GOLD's hybrid with each student token matched to its first teacher token under ``W``.

    Beyond exact matches this pairs tokens that the other side spells in pieces, such as numbers of
    several digits, which GOLD's unmatched part suppresses. Student tokens matched to one teacher
    token have their probabilities summed.

    Args:
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        temperature: divides both sides' logits in KD.
        min_weight: smallest entry of ``W`` (its largest of the row) that makes a match.
        beta: as for GOLD; 0, the forward KL, by default.
        matched_weight: as for GOLD.
        unmatched_weight: as for GOLD.
        skip_eos: as for GOLD.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.
    """

    def __init__(
        self,
        kd_ratio: float = 0.5,
        temperature: float = 1.0,
        min_weight: float = 0.6,
        beta: float = 0.0,
        matched_weight: float | None = 1.0,
        unmatched_weight: float | None = 1.0,
        skip_eos: bool = False,
        memory_budget_mb: float = DEFAULT_BUDGET_MB,
    ) -> None:
        super().__init__(
            kd_ratio, temperature, beta, matched_weight, unmatched_weight, skip_eos, memory_budget_mb
        )
        if not 0.0 < min_weight <= 1.0:
            raise UserError(f"min_weight of XTokenHybridObjective must lie in (0, 1], not {min_weight}.")
        self.min_weight = min_weight

    def matched_tokens(self, student: ModelSpace, teacher: ModelSpace) -> Tensor:
        rows, columns, weights = sparse_projection(student, teacher)
        best = weights.new_zeros(student.vocab_size).scatter_reduce(0, rows, weights, "amax")
        top = (weights >= best[rows]) & (weights >= self.min_weight)
        match = rows.new_full((student.vocab_size,), teacher.vocab_size)
        match = match.scatter_reduce(0, rows[top], columns[top], "amin")
        return match.masked_fill(match == teacher.vocab_size, -1)
