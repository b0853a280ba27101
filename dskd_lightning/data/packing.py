"""Which lengths share a row: best-fit decreasing over a histogram, not over examples.

Equal lengths are interchangeable, so rows with the same lengths are one group with a count. What is
left to do grows with the number of different lengths, and not with the number of examples.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["RowGroup", "pack_lengths"]


@dataclass(frozen=True)
class RowGroup:
    """Rows of the same lengths.

    Args:
        lengths: ``[examples in a row]``, descending.
        count: how many such rows there are.
    """

    lengths: tuple[int, ...]
    count: int


def pack_lengths(counts: npt.NDArray[np.integer], room: int) -> list[RowGroup]:
    """Rows of at most ``room`` tokens that hold every example once.

    The same rows as best-fit decreasing makes example by example: each example, longest first, goes
    where the least space remains.

    Args:
        counts: ``[lengths]``, how many examples have each length.
        room: of a row; an example longer than that has a row of its own.
    """
    open_rows: dict[int, list[RowGroup]] = {}  # space left -> rows
    spaces: list[int] = []  # keys of open_rows, ascending
    closed: list[RowGroup] = []

    def keep(group: RowGroup, space: int) -> None:
        if space <= 0:
            closed.append(group)
            return
        if space not in open_rows:
            bisect.insort(spaces, space)
            open_rows[space] = []
        open_rows[space].append(group)

    def fill(group: RowGroup, space: int, length: int, left: int) -> int:
        """Put up to ``left`` examples of ``length`` into the group's rows; how many remain."""
        each = max(1, space // length)
        full, rest = divmod(min(left, each * group.count), each)
        if full:
            keep(RowGroup(group.lengths + (length,) * each, full), space - each * length)
        if rest:
            keep(RowGroup(group.lengths + (length,) * rest, 1), space - rest * length)
        untouched = group.count - full - bool(rest)
        if untouched:
            keep(RowGroup(group.lengths, untouched), space)
        return left - full * each - rest

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left and (at := bisect.bisect_left(spaces, length)) < len(spaces):
            space = spaces[at]
            group = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
            left = fill(group, space, length, left)
        if left:
            each = max(1, room // max(1, length))
            fill(RowGroup((), -(-left // each)), room, length, left)
    return closed + [group for space in spaces for group in open_rows[space]]
