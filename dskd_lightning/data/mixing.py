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
        return self.rows[self.starts[:-1] + epoch % np.diff(self.starts)]


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
    places: list[_Ints] = []  # positions in `rows` that share a place
    for file in np.unique(files).tolist():
        mine = np.flatnonzero(files == file)
        whole, part = divmod(weights[file], 1)
        places += [place for _ in range(int(whole)) for place in mine[:, None]]
        some = round(part * len(mine))
        if some:
            shuffled = rng.permutation(mine)
            by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
            places += [rng.permutation(place) for place in np.array_split(by_length, some)]
    chosen = np.concatenate(places) if places else np.zeros(0, np.intp)
    starts = np.append(0, np.cumsum([len(place) for place in places], dtype=np.intp))
    most = np.maximum.reduceat(lengths[chosen], starts[:-1]) if places else lengths[:0]
    return Mixture(most, rows[chosen], starts)
