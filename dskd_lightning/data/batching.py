"""Which examples form which batch: a pure function of lengths, seed, epoch and settings.

Plans do not depend on the number of ranks. Step ``j`` of rank ``r`` takes batch ``j * ranks + r``,
so two ranks with batches of b see what one rank sees with batches of 2b (without a token budget)
or with two accumulated batches of b. Nothing is dropped or repeated: the last batch may be small,
and ranks that the last step leaves without a batch get an empty one (no rows), which
the collator turns into a row without response, so that all ranks run the same number of steps.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Batch", "BatchSettings", "plan_batches", "rank_batches"]

Batch = list[list[int]]
"""Rows of a batch, each the indices of its examples (one, unless rows are packed)."""

_Lengths = npt.NDArray[np.integer]
_WINDOW = 2048  # examples that are sorted together; batches come from all over it
_COUNTED_EPOCHS = 4


@dataclass(frozen=True)
class BatchSettings:
    """How batches are built.

    Args:
        batch_size: rows per batch; with a token budget, unused.
        max_tokens: most tokens of a batch, padding included; None for a fixed number of rows.
        packing: put several examples in a row of ``max_length`` tokens.
        max_length: longest row when packing.
    """

    batch_size: int = 8
    max_tokens: int | None = None
    packing: bool = False
    max_length: int = 512

    @property
    def rows(self) -> int:
        """Rows per batch where their number is fixed."""
        if self.packing and self.max_tokens is not None:
            return max(1, self.max_tokens // self.max_length)
        return self.batch_size


def plan_batches(
    lengths: _Lengths, settings: BatchSettings, *, seed: int = 0, epoch: int = 0, shuffle: bool = True
) -> list[Batch]:
    """All batches of an epoch; their number is the same in every epoch.

    Args:
        lengths: ``[examples]``, tokens of each example (the longest over the models).
        settings: how batches are built.
        seed: of the order; the same seed and epoch give the same batches on every machine.
        epoch: counts from 0.
        shuffle: False keeps the order of the data, or sorts by length under a token budget.
    """
    if not len(lengths):
        return []
    if not settings.packing and settings.max_tokens is None:
        order = _rng(seed, epoch).permutation(len(lengths)) if shuffle else np.arange(len(lengths))
        rows = [[index] for index in order.tolist()]
        return _groups(rows, settings.batch_size)
    if not shuffle:
        return _units_to_batches(_units(lengths, settings, None, len(lengths)), settings)
    target = max(
        len(_units(lengths, settings, None, len(lengths))),
        *(len(_units(lengths, settings, _rng(seed, e), _WINDOW)) for e in range(_COUNTED_EPOCHS)),
    )
    rng = _rng(seed, epoch)
    units = _units(lengths, settings, rng, _WINDOW)
    if len(units) > target:  # a rare order that packs worse than the counted ones
        units = _units(lengths, settings, None, len(lengths))
    _split_to(units, target)
    return _units_to_batches([units[i] for i in rng.permutation(len(units))], settings)


def rank_batches(batches: list[Batch], rank: int, ranks: int) -> list[Batch]:
    """The batches of one rank; an empty one at the end where there aren't enough."""
    steps = -(-len(batches) // ranks)
    mine = batches[rank::ranks]
    return mine + [[] for _ in range(steps - len(mine))]


def _rng(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch])


def _groups(rows: list[list[int]], size: int) -> list[Batch]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _units_to_batches(units: list[list[int]], settings: BatchSettings) -> list[Batch]:
    """Units are rows when packing, else whole batches."""
    if settings.packing:
        return _groups(units, settings.rows)
    return [[[index] for index in unit] for unit in units]


def _units(
    lengths: _Lengths, settings: BatchSettings, rng: np.random.Generator | None, window: int
) -> list[list[int]]:
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    units: list[list[int]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        if settings.packing:
            units += _best_fit_decreasing(part, lengths, settings.max_length)
        else:
            assert settings.max_tokens is not None
            units += _cut_by_budget(part, lengths, settings.max_tokens)
    return units


def _cut_by_budget(order: npt.NDArray[np.intp], lengths: _Lengths, budget: int) -> list[list[int]]:
    """Runs of examples, longest first, whose number times their longest is at most ``budget``."""
    runs, start = [], 0
    while start < len(order):
        size = max(1, budget // int(lengths[order[start]]))
        runs.append(order[start : start + size].tolist())
        start += size
    return runs


def _best_fit_decreasing(order: npt.NDArray[np.intp], lengths: _Lengths, room: int) -> list[list[int]]:
    """Rows of at most ``room`` tokens; each example goes where the least space remains."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space, row), ascending
    for index in order.tolist():
        length = int(lengths[index])
        at = bisect.bisect_left(spaces, (length, -1))
        if at < len(spaces):
            space, row = spaces.pop(at)
            rows[row].append(index)
        else:
            space, row = room, len(rows)
            rows.append([index])
        bisect.insort(spaces, (space - length, row))
    return rows


def _split_to(units: list[list[int]], count: int) -> None:
    """Halve the largest units in place until there are ``count``."""
    while len(units) < count:
        largest = max(range(len(units)), key=lambda i: len(units[i]))
        unit = units[largest]
        if len(unit) == 1:
            return
        units[largest] = unit[: len(unit) // 2]
        units.append(unit[len(unit) // 2 :])
