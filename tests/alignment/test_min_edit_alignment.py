"""Edit-distance alignment of token sequences against a table filled cell by cell."""

from __future__ import annotations

from time import process_time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dskd_lightning.alignment.min_edit import _cheapest_path, align_tokens

SEQUENCES = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=9)


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def table(student: list[str], teacher: list[str]) -> np.ndarray:
    total = np.full((len(student), len(teacher)), np.inf)
    for i, x in enumerate(student):
        for j, y in enumerate(teacher):
            before = [total[i - 1, j - 1]] if i and j else []
            before += [total[i - 1, j]] if i else []
            before += [total[i, j - 1]] if j else []
            total[i, j] = levenshtein(x, y) + min(before, default=0)
    return total


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, SEQUENCES)
def test_path_is_cheapest_and_monotone(student, teacher):
    cost = np.array([[levenshtein(x, y) for y in teacher] for x in student], np.int32)
    path = _cheapest_path(cost)
    assert path[0].tolist() == [0, 0]
    assert path[-1].tolist() == [len(student) - 1, len(teacher) - 1]
    steps = np.diff(path, axis=0)
    assert ((steps >= 0) & (steps <= 1)).all()
    assert (steps.sum(1) >= 1).all()
    assert cost[path[:, 0], path[:, 1]].sum() == table(student, teacher)[-1, -1]


@settings(max_examples=40, deadline=None)
@given(SEQUENCES, SEQUENCES)
def test_partners_are_one_to_one_and_ascend(student, teacher):
    partner = align_tokens(student, teacher)
    used = partner[partner >= 0]
    assert (np.diff(used) > 0).all()
    assert len(partner) == len(student)
    assert (align_tokens(student, student) == np.arange(len(student))).all()


def test_split_tokens_have_no_partner():
    # "b" is nearer to "a" than to "bcde": the method follows distances, not the text.
    assert align_tokens(["a", "bcde", "f"], ["a", "b", "cde", "f"]).tolist() == [-1, 2, 3]
    assert align_tokens([], ["a"]).tolist() == []
    assert align_tokens(["a"], []).tolist() == [-1]


def test_is_fast():
    """Two sequences of 512 in well under what a Python loop over their table would take."""
    rng = np.random.default_rng(0)
    sides = [["".join(rng.choice(list("abcdef"), 4)) for _ in range(512)] for _ in range(2)]
    start = process_time()
    align_tokens(*sides)
    assert process_time() - start < 2.0
