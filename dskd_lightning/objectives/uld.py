"""Universal logit distillation (ULD, arXiv 2402.12030)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.functional.sorting import sorted_rows
from dskd_lightning.objectives.paired import PairedObjective, Pairs, Partners
from dskd_lightning.structures import Alignment, Side

__all__ = ["ULDObjective", "sorted_l1"]


def sorted_l1(p: Tensor, q: Tensor) -> Tensor:
    """L1 distance ``[...]`` of ``p`` ``[..., a]`` and ``q`` ``[..., b]``, largest against largest.

    The shorter is padded by zeros at its small end. It is the Wasserstein distance under a cost
    that ignores which token is which.
    """
    size = max(p.shape[-1], q.shape[-1])
    p, q = (F.pad(sorted_rows(x), (size - x.shape[-1], 0)) for x in (p, q))
    return (p - q).abs().sum(-1)


class ULDObjective(PairedObjective):
    """Sorted distributions compared by L1, k-th response position against k-th.

    Needs no map between the vocabularies and no alignment (which only its metrics read): beyond
    the first token that the two sides split differently, the k-th positions lie at different
    places of the text. Student positions behind the teacher's last have no KD term.

    Args:
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        temperature: divides both sides' logits; 1 in the paper.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.
    """

    needs_vocabulary_map = False
    vocabulary_copies = 16  # sorts of both sides

    def __init__(
        self, kd_ratio: float = 0.5, temperature: float = 1.0, memory_budget_mb: float = DEFAULT_BUDGET_MB
    ) -> None:
        super().__init__(kd_ratio, temperature, memory_budget_mb)

    reads_alignment = False

    def partners(self, student: Side, teacher: Side, alignment: Alignment) -> Partners:
        keys = student.sequence.contiguous()
        place = torch.arange(len(student), device=keys.device) - torch.searchsorted(keys, keys)
        others = teacher.sequence.contiguous()
        first = torch.searchsorted(others, keys)
        count = torch.searchsorted(others, keys, right=True) - first
        return Partners(torch.where(place < count, first + place, -1), most=len(teacher))

    def compare(self, pairs: Pairs) -> dict[str, Tensor]:
        p = (pairs.teacher / self.temperature).softmax(-1)
        q = (pairs.student / self.temperature).softmax(-1)
        return {"uld": sorted_l1(p, q)}
