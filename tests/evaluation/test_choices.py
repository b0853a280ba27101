"""Which choice an answer names."""

from __future__ import annotations

import pytest

from dskd_lightning.evaluation.choices import choices_of, chosen


@pytest.mark.parametrize(
    ("answer", "choices", "wanted"),
    [
        ("It is a Mammal, not a fish.", ["fish", "mammal"], "mammal"),
        ("mammals", ["fish", "mammal"], None),
        ("New York City", ["New York", "New York City"], "New York City"),
        ("I take a (B).", ["A", "B"], "B"),
        ("C++", ["C", "C++"], "C++"),
        ("neither", ["fish", "mammal"], None),
        ("", ["a", "b"], None),
    ],
)
def test_the_first_choice_in_words_of_its_own(answer: str, choices: list[str], wanted: str | None) -> None:
    assert chosen(answer, choices) == wanted


@pytest.mark.parametrize(
    ("held", "read"),
    [
        ([" yes", "no"], ["yes", "no"]),
        (["yes"], []),
        (["yes", "yes "], []),
        (["yes", ""], []),
        ({"text": ["a", "b"]}, []),
        ([1, 2], []),
        (None, []),
    ],
)
def test_choices_are_a_list_of_different_texts(held, read) -> None:
    assert choices_of({"choices": held}) == read
