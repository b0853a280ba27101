from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dskd_lightning.data.batching import Batch, BatchSettings, plan_batches, rank_batches

MODES = {
    "fixed": BatchSettings(3),
    "tokens": BatchSettings(max_tokens=64),
    "packed": BatchSettings(2, packing=True, max_length=32),
    "packed tokens": BatchSettings(max_tokens=64, packing=True, max_length=32),
}


def flat(batches: list[Batch]) -> list[int]:
    return [index for batch in batches for row in batch for index in row]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 32), min_size=1, max_size=80),
    mode=st.sampled_from(sorted(MODES)),
    epoch=st.integers(0, 9),
    ranks=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_every_example_once_within_limits(lengths, mode, epoch, ranks, shuffle) -> None:
    array, how = np.array(lengths), MODES[mode]
    plan = plan_batches(array, how, seed=1, epoch=epoch, shuffle=shuffle)
    assert sorted(flat(plan)) == list(range(len(lengths)))
    assert plan == plan_batches(array, how, seed=1, epoch=epoch, shuffle=shuffle)
    assert len(plan) == len(plan_batches(array, how, seed=1, epoch=epoch + 1, shuffle=shuffle))
    for batch in plan:
        widths = [sum(lengths[i] for i in row) for row in batch]
        if how.max_tokens is not None:
            assert len(batch) * max(widths) <= how.max_tokens
        if how.packing:
            assert max(widths) <= how.max_length
    per_rank = [rank_batches(plan, rank, ranks) for rank in range(ranks)]
    assert len({len(mine) for mine in per_rank}) == 1
    assert sorted(flat([batch for mine in per_rank for batch in mine])) == list(range(len(lengths)))


def test_two_ranks_see_what_one_sees_with_twice_the_batch() -> None:
    lengths = np.arange(1, 22)
    two = plan_batches(lengths, BatchSettings(4), seed=3)
    one = plan_batches(lengths, BatchSettings(8), seed=3)
    joined = [a + b for a, b in zip(rank_batches(two, 0, 2), rank_batches(two, 1, 2), strict=True)]
    assert joined == one


@pytest.mark.parametrize("mode", sorted(MODES))
def test_epochs_and_seeds_shuffle(mode: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 33, 200)
    orders = [
        flat(plan_batches(lengths, MODES[mode], seed=seed, epoch=epoch))
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_little_padding_and_tight_packing() -> None:
    lengths = np.random.default_rng(0).integers(8, 513, 5000)
    padded = plan_batches(lengths, BatchSettings(max_tokens=8192))
    total = sum(len(batch) * max(lengths[row[0]] for row in batch) for batch in padded)
    assert lengths.sum() / total > 0.97
    rows = [row for batch in plan_batches(lengths, BatchSettings(8, packing=True)) for row in batch]
    assert lengths.sum() / (512 * len(rows)) > 0.97
