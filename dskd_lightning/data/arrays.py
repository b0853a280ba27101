"""Numbers of examples in as few bytes as they need: there may be ten million of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["kind_for", "small", "up_to"]

_Array = npt.NDArray[np.integer]


def kind_for(top: int) -> type[np.signedinteger]:
    """The integers of 16, 32 or 64 bits that reach ``top``."""
    return np.int16 if top < 1 << 15 else np.int32 if top < 1 << 31 else np.int64


def small(array: _Array) -> _Array:
    """The same values in 16 or 32 bits where they fit."""
    return array.astype(kind_for(int(array.max(initial=0))), order="C", copy=False)


def up_to(count: int) -> _Array:
    """The numbers from 0 to below ``count``."""
    return np.arange(count, dtype=kind_for(max(count - 1, 0)))
