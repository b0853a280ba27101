"""How evenly the ranks of a step are loaded: the others wait for the fullest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["RankLoads"]

Reduction = Callable[[Tensor], Tensor]


class RankLoads:
    """Padded tokens of each rank's batches since the last step, which travel beside other sums."""

    def __init__(self) -> None:
        self._own = 0
        self._all: Tensor | None = None

    def add(self, tokens: int) -> None:
        """Count a batch of this rank.

        Args:
            tokens: of the student, padding included.
        """
        self._own += tokens

    def beside(
        self, all_reduce: Callable[[Tensor], Tensor], rank: int, ranks: int
    ) -> Callable[[Tensor], Tensor]:
        """A reduction that sums each rank's count in the same message; the next step counts anew."""
        own, self._own, self._all = self._own, 0, None

        def reduce(sums: Tensor) -> Tensor:
            loads = sums.new_zeros(ranks)
            loads[rank] = own
            found = all_reduce(torch.cat([sums.flatten(), loads]))
            self._all = found[sums.numel() :]
            return found[: sums.numel()].view_as(sums)

        return reduce if ranks > 1 else all_reduce

    def figures(self) -> dict[str, Tensor]:
        """``train/slowest_rank``: by which share the fullest rank's tokens exceeded the ranks' mean."""
        if self._all is None:
            return {}
        return {"train/slowest_rank": self._all.max() / self._all.mean() - 1}
