"""Places of a mixture: the order that runs resume in, and the memory that millions of examples take."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dskd_lightning.data.batching import BatchSettings, plan_batches
from dskd_lightning.data.mixing import mix


def place_by_place(lengths, files, weights, seed) -> list[list[int]]:
    """The definition: who shares each place, in their order."""
    rng = np.random.default_rng(seed)
    places: list[list[int]] = []
    for file in np.unique(files).tolist():
        mine = np.flatnonzero(files == file)
        whole, part = divmod(weights[file], 1)
        places += [[position] for position in mine.tolist()] * int(whole)
        if some := round(part * len(mine)):
            shuffled = rng.permutation(mine)
            by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
            places += [rng.permutation(place).tolist() for place in np.array_split(by_length, some)]
    return places


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0, 0.1, 0.3, 0.5, 1, 1.5, 2, 3.7]), min_size=4, max_size=4),
    count=st.integers(1, 90),
    seed=st.integers(0, 99),
)
def test_places_are_those_of_the_definition(weights, count, seed) -> None:
    rng = np.random.default_rng(seed)
    lengths, files = rng.integers(1, 30, count), rng.integers(0, 4, count)
    rows = rng.permutation(3 * count)[:count]
    mixture, places = mix(rows, lengths, files, weights, seed), place_by_place(lengths, files, weights, seed)
    found = [part.tolist() for part in np.split(mixture.rows, mixture.starts[1:-1])] if places else []
    assert found == [rows[place].tolist() for place in places]
    assert mixture.lengths.tolist() == [lengths[place].max() for place in places]
    for epoch in (0, 1, 7):
        expected = [rows[place[epoch % len(place)]] for place in places]
        assert mixture.of_epoch(epoch).tolist() == expected


def bytes_each(run: Callable[[], object], examples: int) -> float:
    run()
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] / examples
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("what", ["mixture", "8 rows", "budget"])
def test_ten_million_examples_fit_into_500_megabytes(what) -> None:
    count = 200_000
    rng = np.random.default_rng(0)
    lengths, rows = rng.integers(8, 2048, count).astype(np.int32), np.arange(count)
    files, teachers = rows * 4 // count, rng.integers(-1, 2, count).astype(np.int16)
    sizes = BatchSettings(8) if what == "8 rows" else BatchSettings(max_tokens=16_384)

    def run() -> object:
        if what == "mixture":
            return mix(rows, lengths, files, (2, 1, 0.5, 1.5), 1)
        return plan_batches(lengths, sizes, groups=teachers)

    assert bytes_each(run, count) < 50
