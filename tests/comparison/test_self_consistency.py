"""Answers to the same question in other words, against counts made by hand."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer

from dskd_lightning.comparison.compare_runs import compare_runs
from dskd_lightning.comparison.self_consistency import self_consistency, self_consistency_columns
from dskd_lightning.data.formats import parse_record
from dskd_lightning.errors import UserError
from dskd_lightning.runs.predictions import Prediction
from dskd_lightning.runs.run_folder import RunFolder

# prompt -> (question, answers under two seeds)
ANSWERS = {
    0: ("sky", ("the sky is blue", "it is blue")),
    1: ("sky", ("The sky is blue.", "red")),
    2: ("sky", ("blue is the sky", "the sky is blue")),
    3: (7, ("seven", "seven")),
    4: (7, ("seven", "eight")),
    5: ("alone", ("once", "twice")),
    6: (None, ("nothing", "nothing")),
}


def predictions(seeds: tuple[int | None, ...]) -> dict[int | None, list[Prediction]]:
    return {
        seed: [
            Prediction(i, f"prompt {i}", ("the sky",), answers[at], seed, 3, True,
                       {} if question is None else {"same_as": question})
            for i, (question, answers) in ANSWERS.items()
        ]
        for at, seed in enumerate(seeds)
    }  # fmt: skip


def rouge(one: str, other: str) -> float:
    return 100 * RougeScorer(["rougeL"], use_stemmer=True).score(one, other)["rougeL"].fmeasure


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_each_question_counts_once_and_each_pair_under_one_seed() -> None:
    (found,) = self_consistency([RunFolder(Path("a"), "a", predictions((1, 2)))])
    pairs = {"sky": [(0, 1), (0, 2), (1, 2)], 7: [(3, 4)]}
    scores = {
        pair: [rouge(ANSWERS[pair[0]][1][s], ANSWERS[pair[1]][1][s]) for s in (0, 1)]
        for group in pairs.values()
        for pair in group
    }
    by_question = [[score for pair in group for score in scores[pair]] for group in pairs.values()]
    assert found.questions == 2
    assert found.consistency == pytest.approx(mean([mean(group) for group in by_question]))
    assert found.close == pytest.approx(mean([mean([100 * (s >= 50) for s in g]) for g in by_question]))
    assert found.exact == pytest.approx(mean([100 * 1 / 6, 100 * 1 / 2]))
    own = [[rouge(*ANSWERS[i][1]) for i in group] for group in ((0, 1, 2), (3, 4))]
    assert found.between_seeds == pytest.approx(mean([mean(group) for group in own]))
    worst = [(c.first.index, c.second.index) for c in found.worst]
    assert worst == sorted(scores, key=lambda pair: (mean(scores[pair]), *pair))
    assert found.worst[0].first.response == ANSWERS[worst[0][0]][1][0]


def test_one_seed_says_nothing_of_sampling() -> None:
    (found,) = self_consistency([RunFolder(Path("a"), "a", predictions((None,)))], examples=1)
    assert found.between_seeds is None
    assert len(found.worst) == 1
    labels, ((*row,),) = self_consistency_columns([found])
    assert labels == ["questions", "ROUGE-L between wordings", "above 50, %", "same words, %"]
    assert row[0] == 2


def test_runs_that_were_asked_everything_once_are_left_out() -> None:
    rows = {None: [Prediction(0, "p", ("r",), "x", fields={"same_as": "alone"})]}
    assert self_consistency([RunFolder(Path("a"), "a", rows)]) == []


def test_a_kind_is_no_question() -> None:
    rows = {None: [Prediction(i, "p", ("r",), "x", fields={"same_as": "maths"}) for i in range(51)]}
    with pytest.raises(UserError, match=r"51 prompts hold 'same_as': 'maths', more than 50"):
        self_consistency([RunFolder(Path("a"), "a", rows)])


def test_the_field_is_kept_and_not_called_unused() -> None:
    unused: Counter[str] = Counter()
    record = {"prompt": "why?", "response": "so", "same_as": "q1"}
    example = parse_record(record, "prompt", "data", 1, unused=unused)
    assert json.loads(example.fields) == {"same_as": "q1"}
    assert not unused


def test_compare_prints_it_and_shows_the_worst(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name / "predictions"
        folder.mkdir(parents=True)
        for seed, rows in predictions((1, 2)).items():
            (folder / f"seed_{seed}.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    said = io.StringIO()
    compare_runs(
        [tmp_path / "a", tmp_path / "b"], output=tmp_path / "out", resamples=50,
        console=Console(file=said, width=200),
    )  # fmt: skip
    assert "the same question in other words" in said.getvalue()
    (one, other) = json.loads((tmp_path / "out" / "comparison.json").read_text())["self_consistency"]
    assert (one["run"], one["questions"], len(one["worst"])) == ("a", 2, 4)
    assert {**one, "run": "b"} == other
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The same question in other words" in page
    assert "Least like each other" in page
