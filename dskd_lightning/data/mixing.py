"""How often an epoch reads the examples of each file.

A file of weight 2 is read twice in every epoch; of one of weight 0.5 every epoch reads half, in turn: its
examples are sorted by length and cut into neighbourhoods, from each of which an epoch takes the next
one. A place in the epoch is as long as the longest of its neighbourhood, so that all epochs are
planned alike, whoever takes the places: same number of batches, same budgets, same packing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dskd_lightning.data.arrays import small, up_to

__all__ = ["Mixture", "mix"]

_Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Mixture:
    """The places of an epoch, and who may take each.

    Args:
        lengths: ``[places]``, most tokens that a place needs in any epoch.
        rows: ``[candidates]``, rows of the dataset, place by place.
        starts: ``[places + 1]``, where each place begins in ``rows``.
    """

    lengths: _Ints
    rows: _Ints
    starts: _Ints

    def of_epoch(self, epoch: int) -> _Ints:
        """``[places]``, the rows that ``epoch`` reads; each candidate comes once before one comes again."""
        places = np.diff(self.starts)
        np.remainder(epoch, places, out=places)
        places += self.starts[:-1]
        return self.rows[places]


def mix(
    rows: _Ints, lengths: _Ints, files: _Ints, weights: Mapping[int, float] | Sequence[float], seed: int
) -> Mixture:
    """Places for the examples of all files.

    Args:
        rows: ``[examples]``, their rows in the dataset.
        lengths: ``[examples]``, their tokens.
        files: ``[examples]``, number of the file that each is from.
        weights: per file, how often an epoch reads it.
        seed: of who comes first.
    """
    rng = np.random.default_rng(seed)
    by_file = small(np.argsort(files, kind="stable"))
    numbers, counts = np.unique(files, return_counts=True)
    parts = [
        _of_file(mine, lengths, weights[number], rng)
        for number, mine in zip(numbers.tolist(), np.split(by_file, np.cumsum(counts)[:-1]), strict=True)
    ]
    del by_file
    starts = np.zeros(sum(len(sizes) for _, sizes in parts) + 1, np.intp)
    np.cumsum(np.concatenate([up_to(0), *(sizes for _, sizes in parts)]), out=starts[1:])
    chosen = np.concatenate([up_to(0), *(positions for positions, _ in parts)])
    del parts
    most = np.maximum.reduceat(lengths[chosen], starts[:-1]) if len(chosen) else lengths[:0]
    return Mixture(most, rows[chosen], starts)


def _of_file(mine: _Ints, lengths: _Ints, weight: float, rng: np.random.Generator) -> tuple[_Ints, _Ints]:
    """Positions of a file's examples, place by place, and how many share each place.

    Args:
        mine: ``[examples]``, positions of the file's.
        lengths: of all examples.
        weight: how often an epoch reads the file.
        rng: of who comes first.
    """
    whole, part = divmod(weight, 1)
    positions, sizes = [np.tile(mine, int(whole))], [np.ones(int(whole) * len(mine), mine.dtype)]
    if some := round(part * len(mine)):
        shuffled = rng.permutation(mine)
        by_length = shuffled[np.argsort(small(lengths[shuffled]), kind="stable")]  # radix for 16-bit keys
        size, larger = divmod(len(mine), some)  # as `np.array_split` shares them out
        border = larger * (size + 1)
        for places, count in ((by_length[:border], size + 1), (by_length[border:], size)):
            together = places.reshape(-1, count)
            rng.permuted(together, axis=1, out=together)
            sizes.append(np.full(len(together), count, mine.dtype))
        positions.append(by_length)
    return np.concatenate(positions), np.concatenate(sizes)
