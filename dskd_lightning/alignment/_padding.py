"""Positions that are flattened over the examples of a batch, laid out one example a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rows"]


@dataclass(frozen=True)
class Rows:
    """Where each of ``n`` flat positions lies in a ``[examples, longest]`` layout.

    Args:
        sequence: ``[n]``, example of each position, non-decreasing.
        place: ``[n]``, index of the position within its example.
        counts: ``[examples]``, positions of each example.
        longest: the largest count.
    """

    sequence: Tensor
    place: Tensor
    counts: Tensor
    longest: int

    @classmethod
    def of(cls, sequence: Tensor, examples: int, longest: int | None = None) -> Rows:
        """Rows of flat positions whose examples are ``sequence`` ``[n]``.

        Without ``longest``, the most positions of one example, the device is asked for it.
        """
        counts = sequence.new_zeros(examples).index_add(0, sequence, torch.ones_like(sequence))
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(sequence), device=sequence.device) - starts[sequence]
        if longest is None:
            longest = int(counts.max()) if examples else 0
        return cls(sequence, place, counts, longest)

    def pad(self, values: Tensor) -> Tensor:
        """``[n, ...]`` -> ``[examples, longest, ...]``, zeros behind each example's last."""
        padded = values.new_zeros(len(self.counts), self.longest, *values.shape[1:])
        return padded.index_put((self.sequence, self.place), values)

    def flatten(self, padded: Tensor) -> Tensor:
        """``[examples, longest, ...]`` -> ``[n, ...]``."""
        return padded[self.sequence, self.place]

    @property
    def mask(self) -> Tensor:
        """``[examples, longest]``, True at positions."""
        return torch.arange(self.longest, device=self.counts.device) < self.counts.unsqueeze(1)
