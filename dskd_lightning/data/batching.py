"""Which examples form which batch: a pure function of lengths, seed, epoch and settings.

Lengths alone say how many batches there are and which lengths meet in one; chance says which of
the examples of a length goes where, and in which order the batches come. So all epochs have the same
number of batches, and a plan takes a few array operations for any number of examples.

Plans do not depend on the number of ranks. Step ``j`` of rank ``r`` takes batch ``j * ranks + r``,
so two ranks with batches of b see what one rank sees with batches of 2b (without a token budget)
or with two accumulated batches of b. Nothing is dropped or repeated: the last batch may be small,
and ranks that the last step leaves without a batch get an empty one (no rows), which
the collator turns into a row without response, so that all ranks run the same number of steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dskd_lightning.data.arrays import kind_for, small, up_to
from dskd_lightning.data.packing import pack_lengths

__all__ = ["Batch", "BatchPlan", "BatchSettings", "plan_batches"]

Batch = list[list[int]]
"""Rows of a batch, each the indices of its examples (one, unless rows are packed)."""

PLAN_VERSION = 3
"""Changes when the same lengths, seed and epoch give other batches: a place in the old ones means nothing."""

_TOGETHER = 64
"""Most batches that stay neighbours with `BatchSettings.group_by_length`: a step of so many ranks is even."""
_GROUPS = 32
"""Groups of neighbours in an epoch, at least, where batches suffice: few data come in random order."""
_WINDOW = 64 * _TOGETHER
"""Batches whose examples are sorted together."""
_PIECE = 1 << 18
"""Rows or batches that are looked up together."""

_Array = npt.NDArray[np.integer]


@dataclass(frozen=True)
class BatchSettings:
    """How batches are built.

    Args:
        batch_size: rows per batch; with a token budget, unused.
        max_tokens: most tokens of a batch, padding included; None for a fixed number of rows.
        packing: put several examples in a row of ``max_length`` tokens.
        max_length: longest row when packing.
        group_by_length: fixed numbers of rows of similar lengths, and batches of similar lengths next to each
            other, so that the ranks of a step have about as much to do: up to 64 of them, a thirty-second of
            an epoch's at most.
    """

    batch_size: int = 8
    max_tokens: int | None = None
    packing: bool = False
    max_length: int = 512
    group_by_length: bool = False

    @property
    def rows(self) -> int:
        """Rows per batch where their number is fixed."""
        if self.packing and self.max_tokens is not None:
            return max(1, self.max_tokens // self.max_length)
        return self.batch_size


class BatchPlan(Sequence[Batch]):
    """Batches as three arrays; batch ``i`` is made when it is asked for.

    Tensors, and not NumPy arrays, since PyTorch hands those to worker processes without a copy.

    Args:
        examples: ``[examples]``, in the order in which the batches read them.
        rows: ``[rows + 1]``, where each row begins in ``examples``.
        batches: ``[batches + 1]``, where each batch begins in ``rows``.
    """

    def __init__(self, examples: Tensor, rows: Tensor, batches: Tensor) -> None:
        self.examples, self.rows, self.batches = examples, rows, batches

    @classmethod
    def from_arrays(cls, examples: _Array, rows: _Array, batches: _Array) -> BatchPlan:
        """A plan of arrays, kept as small as their values allow."""
        return cls(*(torch.from_numpy(small(array)) for array in (examples, rows, batches)))

    @classmethod
    def joined(cls, plans: Sequence[BatchPlan]) -> BatchPlan:
        """The batches of one plan after the other's."""
        rows, batches = [plan.rows.numpy() for plan in plans], [plan.batches.numpy() for plan in plans]
        return cls.from_arrays(
            np.concatenate([plan.examples.numpy() for plan in plans]), _end_to_end(rows), _end_to_end(batches)
        )

    def __len__(self) -> int:
        return len(self.batches) - 1

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> BatchPlan: ...
    def __getitem__(self, index: int | slice) -> Batch | BatchPlan:
        if isinstance(index, slice):
            return self._taken(np.arange(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        first, last = self.batches[index % len(self) :][:2].tolist()
        starts = self.rows[first : last + 1].tolist()
        examples = self.examples[starts[0] : starts[-1]].tolist()
        return [examples[a - starts[0] : b - starts[0]] for a, b in itertools.pairwise(starts)]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, BatchPlan):
            pairs = ((self.examples, other.examples), (self.rows, other.rows), (self.batches, other.batches))
            return all(torch.equal(a, b) for a, b in pairs)
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def of_rank(self, rank: int, ranks: int) -> BatchPlan:
        """The batches of one rank; an empty one at the end where there aren't enough."""
        if ranks == 1:
            return self
        mine = self[rank::ranks]
        missing = -(-len(self) // ranks) - len(mine)
        return BatchPlan(
            mine.examples, mine.rows, torch.cat([mine.batches, mine.batches[-1:].repeat(missing)])
        )

    def renamed(self, names: _Array) -> BatchPlan:
        """The same batches with example ``i`` called ``names[i]``."""
        return BatchPlan(torch.from_numpy(small(names[self.examples.numpy()])), self.rows, self.batches)

    def _taken(self, which: npt.NDArray[np.intp]) -> BatchPlan:
        rows, batches = _gathered(self.batches.numpy(), which)
        examples, starts = _gathered(self.rows.numpy(), rows)
        return BatchPlan.from_arrays(self.examples.numpy()[examples], starts, batches)


def plan_batches(
    lengths: _Array,
    settings: BatchSettings,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    groups: _Array | None = None,
) -> BatchPlan:
    """All batches of an epoch; their number is the same in every epoch.

    Args:
        lengths: ``[examples]``, tokens of each example (the longest over the models).
        settings: how batches are built.
        seed: of the order; the same seed and epoch give the same batches on every machine.
        epoch: counts from 0.
        shuffle: False keeps the order of the data, or sorts by length under a token budget.
        groups: ``[examples]``, None for one; examples of two groups never meet in a batch.
    """
    if groups is not None:
        plans = []
        for group in np.unique(groups):
            mine = small(np.flatnonzero(groups == group))
            plan = plan_batches(lengths[mine], settings, seed=seed, epoch=epoch, shuffle=shuffle)
            plans.append(plan.renamed(mine))
        plan = BatchPlan.joined(plans)
        del plans  # of ten million examples that is room that the order of the batches needs
        if not shuffle:
            return plan
        return plan._taken(np.random.default_rng([seed, epoch, 1]).permutation(len(plan)))
    rng = np.random.default_rng([seed, epoch]) if shuffle else None
    count = len(lengths)
    order = up_to(count)
    if rng is not None:
        rng.shuffle(order)
    if settings.packing:
        examples, rows = _packed(lengths, order, settings.max_length)
        if rng is not None:
            examples, rows = _reordered(examples, rows, rng.permutation(len(rows) - 1))
        return BatchPlan.from_arrays(examples, rows, _every(settings.rows, len(rows) - 1))
    if settings.max_tokens is None:
        if settings.group_by_length:
            order = _neighbours(lengths, order, settings.batch_size, rng)
        return BatchPlan.from_arrays(order, up_to(count + 1), _every(settings.batch_size, count))
    order = _longest_first(lengths, order)
    batches = _cut_by_budget(np.bincount(lengths) if count else lengths, settings.max_tokens)
    if rng is not None:
        order, batches = _reordered(order, batches, rng.permutation(len(batches) - 1))
    return BatchPlan.from_arrays(order, up_to(count + 1), batches)


def _neighbours(lengths: _Array, order: _Array, size: int, rng: np.random.Generator | None) -> _Array:
    """``order`` sorted by length within windows, cut into groups of batches that stay neighbours.

    Groups follow each other at random, as do the batches of a group: with one rank an epoch reads long and
    short batches in turn. What fills no group comes last; it is as long as any other.
    """
    windows = np.arange(len(order)) // (size * _WINDOW)
    order = order[np.lexsort((-lengths[order].astype(np.int64), windows))]
    if rng is None or len(order) < size:
        return order
    batches = len(order) // size
    together = min(_TOGETHER, 1 << max(batches // _GROUPS, 1).bit_length() - 1)
    window = (len(order) - 1) // (size * _WINDOW) * size * _WINDOW
    whole, rest = divmod(len(order) - window, together * size)
    start = window + int(rng.integers(whole + 1)) * together * size
    groups = np.concatenate([order[:start], order[start + rest :]]).reshape(-1, together, size)
    within = rng.random((len(groups), together), np.float32).argsort(1)
    last = order[start : start + rest]
    full = last[: rest // size * size]
    return np.concatenate([
        groups[rng.permutation(len(groups))[:, None], within].ravel(),
        rng.permutation(full.reshape(-1, size)).ravel(),
        last[len(full) :],
    ])  # fmt: skip


def _every(size: int, count: int) -> _Array:
    """Where groups of ``size`` begin, and the end."""
    return np.append(np.arange(0, count, size), count)


def _end_to_end(starts: Sequence[_Array]) -> _Array:
    """Where groups begin that follow each other, and the end."""
    found = np.empty(sum(len(part) - 1 for part in starts) + 1, kind_for(sum(int(p[-1]) for p in starts)))
    at = offset = 0
    for part in starts:
        here = found[at : at + len(part)]  # its last is the first of the next one
        here[:] = part
        here += offset
        at, offset = at + len(part) - 1, int(here[-1])
    return found


def _longest_first(lengths: _Array, order: _Array) -> _Array:
    keys = lengths.max(initial=0) - lengths[order]
    return order[np.argsort(small(keys), kind="stable")]  # a radix sort for 16-bit keys


def _cut_by_budget(counts: _Array, budget: int) -> _Array:
    """Where batches begin, longest example first, so that examples times the longest is in the budget."""
    starts: list[_Array] = []
    start = end = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end += int(counts[length])
        if start >= end:
            continue  # a batch that began with a longer one has them all
        size = max(1, budget // max(1, length))
        starts.append(np.arange(start, end, size))
        start += size * len(starts[-1])
    return np.concatenate([*starts, np.array([end])])


def _packed(lengths: _Array, order: _Array, room: int) -> tuple[_Array, _Array]:
    """Examples row by row, and where rows begin; of equal lengths, the first in ``order`` comes first."""
    groups = pack_lengths(np.bincount(lengths) if len(lengths) else lengths, room)
    kind = small(np.array([room, lengths.max(initial=0)])).dtype
    slots = np.concatenate(
        [np.zeros(0, kind)] + [np.tile(np.array(g.lengths, kind), g.count) for g in groups]
    )
    sizes = [np.zeros(1, np.int64)] + [np.full(g.count, len(g.lengths), np.int64) for g in groups]
    examples = np.empty(len(slots), order.dtype)
    examples[_longest_first(slots, up_to(len(slots)))] = _longest_first(lengths, order)
    return examples, np.cumsum(np.concatenate(sizes))


def _reordered(items: _Array, starts: _Array, order: _Array) -> tuple[_Array, _Array]:
    taken, starts = _gathered(starts, order)
    return items[taken], starts


def _gathered(starts: _Array, which: _Array) -> tuple[_Array, _Array]:
    """Positions of the items of the groups ``which``, one group after the other, and where each begins.

    NumPy turns indices and counts into 64 bits first, so that this goes piece by piece.

    Args:
        starts: where each group begins, and the end.
        which: none of them twice.
    """
    kind = kind_for(int(starts[-1]))
    begins = np.zeros(len(which) + 1, kind)
    pieces = [(at, which[at : at + _PIECE]) for at in range(0, len(which), _PIECE)]
    for at, some in pieces:
        begins[at + 1 : at + 1 + len(some)] = starts[1:][some] - starts[some]
    np.cumsum(begins, dtype=kind, out=begins)
    taken = np.arange(begins[-1], dtype=kind)
    for at, some in pieces:
        here = begins[at : at + len(some) + 1]
        taken[here[0] : here[-1]] += np.repeat(starts[some] - here[:-1], np.diff(here))
    return taken, begins
