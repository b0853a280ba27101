"""Seeded shares of one prepared dataset."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dskd_lightning.errors import UserError

__all__ = ["split_indices"]


def split_indices(count: int, shares: dict[str, float | int], seed: int) -> dict[str, npt.NDArray[np.intp]]:
    """Disjoint sorted indices for each name in ``shares``, and the rest under ``train``.

    Args:
        count: number of examples.
        shares: share (below 1) or number of examples for each split; 0 for an empty one.
        seed: of the choice.

    Raises:
        UserError: a negative share, or nothing left to train on.
    """
    order = np.random.default_rng(seed).permutation(count)
    splits, start = {}, 0
    for name, share in shares.items():
        size = round(share * count) if isinstance(share, float) and share < 1 else int(share)
        if share < 0 or start + size >= count or (share > 0 and size == 0):
            raise UserError(
                f"`{name}_split: {share}` of {count} training examples leaves no example on one side: choose "
                "a share between 0 and 1 or a smaller number."
            )
        splits[name] = np.sort(order[start : start + size])
        start += size
    splits["train"] = np.sort(order[start:])
    return splits
