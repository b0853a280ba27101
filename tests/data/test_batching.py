from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dskd_lightning.data.batching import Batch, BatchSettings, plan_batches
from dskd_lightning.data.packing import pack_lengths

MODES = {
    "fixed": BatchSettings(3),
    "grouped": BatchSettings(3, group_by_length=True),
    "tokens": BatchSettings(max_tokens=64),
    "packed": BatchSettings(2, packing=True, max_length=32),
    "packed tokens": BatchSettings(max_tokens=64, packing=True, max_length=32),
}


def flat(batches: Iterable[Batch]) -> list[int]:
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
    assert list(plan[1:]) == list(plan)[1:]
    assert len(plan) == len(plan_batches(array, how, seed=1, epoch=epoch + 1, shuffle=shuffle))
    for batch in plan:
        widths = [sum(lengths[i] for i in row) for row in batch]
        if how.max_tokens is not None:
            assert len(batch) * max(widths) <= how.max_tokens
        if how.packing:
            assert max(widths) <= how.max_length
    per_rank = [plan.of_rank(rank, ranks) for rank in range(ranks)]
    assert len({len(mine) for mine in per_rank}) == 1
    assert sorted(flat([batch for mine in per_rank for batch in mine])) == list(range(len(lengths)))


def test_two_ranks_see_what_one_sees_with_twice_the_batch() -> None:
    lengths = np.arange(1, 22)
    two = plan_batches(lengths, BatchSettings(4), seed=3)
    one = plan_batches(lengths, BatchSettings(8), seed=3)
    joined = [a + b for a, b in zip(two.of_rank(0, 2), two.of_rank(1, 2), strict=True)]
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


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=60))
def test_packing_by_counts_equals_best_fit_decreasing_one_by_one(lengths: list[int]) -> None:
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= 32]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    counts = np.bincount(lengths) if lengths else np.zeros(0, int)
    found = [list(group.lengths) for group in pack_lengths(counts, 32) for _ in range(group.count)]
    assert sorted(map(sum, found)) == sorted(map(sum, rows))  # rows with equal room are alike
    assert sorted(itertools.chain.from_iterable(found)) == sorted(lengths)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), budget=st.integers(1, 99))
def test_cuts_by_counts_equal_cuts_one_by_one(lengths: list[int], budget: int) -> None:
    ordered, expected = sorted(lengths, reverse=True), []
    while ordered:
        size = max(1, budget // ordered[0])
        expected.append(ordered[:size])
        ordered = ordered[size:]
    plan = plan_batches(np.array(lengths), BatchSettings(max_tokens=budget), shuffle=False)
    assert [[lengths[i] for i in flat([batch])] for batch in plan] == expected


@pytest.mark.parametrize("mode", sorted(MODES))
def test_workers_get_a_plan_without_a_copy(mode: str) -> None:
    plan = plan_batches(np.arange(1, 30), MODES[mode])
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    queue.put(plan)
    other = queue.get()
    assert other == plan
    plan.examples[0] = 7
    assert other.examples[0] == 7


def padded(batch: Batch, lengths: np.ndarray) -> int:
    return len(batch) * max(int(lengths[row[0]]) for row in batch)


@pytest.mark.parametrize(("ranks", "most"), [(2, 0.05), (8, 0.05), (64, 0.1)])
def test_batches_grouped_by_length_are_even_over_ranks(ranks: int, most: float) -> None:
    """The fullest rank of a step, and all padding, beside those of batches at random."""
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 60_000).astype(np.int64) + 8
    waits, totals = [], []
    for grouped in (False, True):
        plan = plan_batches(lengths, BatchSettings(8, group_by_length=grouped), seed=1)
        parts = [
            [padded(batch, lengths) for batch in plan.of_rank(rank, ranks) if batch] for rank in range(ranks)
        ]
        steps = np.array([part[: len(plan) // ranks] for part in parts])
        waits.append(float((steps.max(0) / steps.mean(0) - 1).mean()))
        totals.append(sum(map(sum, parts)) / int(lengths.sum()))
    assert waits[1] < most < waits[0]
    assert totals[1] < 1.05 < totals[0]


@pytest.mark.parametrize("batches", [40, 83, 500, 3000, 5000])
def test_grouped_batches_come_at_random(batches: int) -> None:
    """Neither the longest first, nor the shortest last, nor every epoch alike."""
    lengths = np.random.default_rng(0).lognormal(5, 0.8, batches * 4 + 2).astype(np.int64) + 8
    place = np.arange(batches)
    correlations, lasts, orders = [], [], set()
    for epoch in range(20):
        plan = plan_batches(lengths, BatchSettings(4, group_by_length=True), seed=3, epoch=epoch)
        widths = np.array([padded(batch, lengths) / len(batch) for batch in plan[:batches]])
        ranks = widths.argsort().argsort()
        correlations.append(float(np.corrcoef(place, ranks)[0, 1]))
        lasts.append(float(ranks[-batches // 32 :].mean()) / batches)
        orders.add(tuple(widths))
    assert abs(np.mean(correlations)) < 0.1
    assert max(map(abs, correlations)) < 0.5
    assert 0.3 < np.mean(lasts) < 0.7
    assert len(orders) == 20


def test_few_grouped_batches_follow_each_other_as_if_drawn() -> None:
    lengths = np.arange(1, 4 * 60 + 1)
    plan = plan_batches(lengths, BatchSettings(4, group_by_length=True), seed=0)
    widths = np.array([padded(batch, lengths) for batch in plan])
    assert float(np.corrcoef(widths[1:], widths[:-1])[0, 1]) < 0.4
