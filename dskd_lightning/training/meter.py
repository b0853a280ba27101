"""Means that are exact over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dskd_lightning.functional.precision import widest
from dskd_lightning.structures import Ratio

__all__ = ["RatioMeter"]


class RatioMeter:
    """Adds up `Ratio`\\ s by name until they are read.

    A mean of per-batch means weighs a batch of one token like a batch of a thousand; sums and
    counts do not. Where a device has no float64, what a sum in float32 loses goes into the next one
    (Kahan's), so that an epoch of many millions of tokens is counted, too.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._lost: dict[str, Tensor] = {}

    def update(self, ratios: Mapping[str, Ratio]) -> None:
        """Add totals and counts; a name may be missing from some updates."""
        for name, ratio in ratios.items():
            device = ratio.total.device
            dtype = widest(device)
            pair = torch.stack([ratio.total.detach().to(dtype), ratio.count.detach().to(device, dtype)])
            self._add(name, pair)

    def _add(self, name: str, pair: Tensor) -> None:
        before = self._sums.get(name)
        if before is None:
            self._sums[name] = pair
        elif pair.dtype == torch.float64:
            self._sums[name] = before + pair
        else:
            more = pair - self._lost.get(name, torch.zeros_like(pair))
            self._sums[name] = before + more
            self._lost[name] = (self._sums[name] - before) - more

    def __bool__(self) -> bool:
        return bool(self._sums)

    def reduce(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, Ratio]:
        """Totals and counts so far, summed over ranks by ``all_reduce``; resets the meter.

        Every rank must have seen the same names, as it does when all run the same objective.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        if all_reduce is not None:
            sums = all_reduce(sums)
        self._sums, self._lost = {}, {}
        return {name: Ratio(total, count) for name, (total, count) in zip(names, sums, strict=True)}
