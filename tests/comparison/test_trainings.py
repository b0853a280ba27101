"""Several training runs of one method as one run of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_compare_runs import make_run, quiet

from dskd_lightning.comparison.compare import compare_all
from dskd_lightning.comparison.compare_runs import compare_runs
from dskd_lightning.comparison.trainings import named_folders, open_trainings, pooled
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.scores import prompt_metric, score_run

WORDS = {
    "sft": [[2, 3, 2, 3, 4, 2], [1, 3, 5, 3, 4, 2], [0, 1, 2, 3, 4, 5]],
    "dskd": [[4, 5, 5, 6, 4, 5], [2, 3, 6, 6, 4, 5], [1, 2, 3, 4, 5, 6]],
}


@pytest.fixture
def methods(tmp_path: Path) -> dict[str, list[Path]]:
    return {
        name: [
            make_run(tmp_path / f"{name}_{i}", words, metrics={"loss": 1.0 + i, f"only_{i}": 0})
            for i, words in enumerate(several)
        ]
        for name, several in WORDS.items()
    }


def asked(methods: dict[str, list[Path]], **names: int) -> list[str]:
    return [f"{name}={','.join(map(str, methods[name][:count]))}" for name, count in names.items()]


def test_a_prompt_scores_the_mean_over_runs_and_seeds(methods: dict[str, list[Path]]) -> None:
    both = [pooled(open_trainings(run)) for run in asked(methods, sft=3, dskd=3)]
    metric = prompt_metric("rougeL")
    (found,) = compare_all(both, metric, resamples=200)
    for name, run, scores in (
        ("sft", both[0], found.baseline_scores),
        ("dskd", both[1], found.candidate_scores),
    ):
        each = [score_run(one, metric).by_prompt for one in open_trainings(asked(methods, **{name: 3})[0])]
        expected = {index: np.mean([scored[index] for scored in each]) for index in range(6)}
        assert scores.by_prompt == pytest.approx(expected)
        assert len(scores.by_seed) == len(run.predictions) == 6
        assert run.name == name
    assert (found.wins, found.ties, found.losses) == (6, 0, 0)
    assert both[0].metrics == {"loss": 2.0}


def test_report_and_files(methods: dict[str, list[Path]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert compare_runs(asked(methods, sft=3, dskd=2), output=out, resamples=200, console=quiet()) == 0
    page = (out / "report.html").read_text()
    assert "2 sampling seeds of each training run (sft: 3, dskd: 2)" in page
    assert "± over 6 samplings" in page
    assert "of seed 10, scores averaged over all seeds, of the first training run of each method" in page
    summary = json.loads((out / "comparison.json").read_text())
    assert (summary["baseline"], summary["candidates"][0]["name"]) == ("sft", "dskd")
    for line in (out / "regressions.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["baseline_response"].split()[:1] == ["one"]


def test_responses_of_one_seed_are_set_side_by_side(tmp_path: Path) -> None:
    """Whatever their files are called."""
    base = make_run(tmp_path / "base", [5, 5, 5])
    make_run(tmp_path / "one", [1, 1, 1], seeds=(10,))
    other = make_run(tmp_path / "other", [3, 3, 3], seeds=(20,))
    (tmp_path / "one" / "predictions" / "seed_10.jsonl").rename(other / "predictions" / "z.jsonl")
    compare_runs([base, other], output=tmp_path / "out", resamples=100, console=quiet())
    lines = (tmp_path / "out" / "regressions.jsonl").read_text().splitlines()
    assert [json.loads(line)["candidate_response"] for line in lines] == ["one"] * 3
    assert "one two three</" not in (tmp_path / "out" / "report.html").read_text()


def test_one_run_is_as_it_was(methods: dict[str, list[Path]], tmp_path: Path) -> None:
    compare_runs(asked(methods, sft=1, dskd=1), output=tmp_path / "out", resamples=200, console=quiet())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "training run" not in page
    assert "± over 2 seeds" in page


def test_the_teacher_beside_them(methods: dict[str, list[Path]], tmp_path: Path) -> None:
    make_run(methods["dskd"][0] / "teacher", [6] * 6)
    runs = [*asked(methods, sft=3, dskd=3), "teacher"]
    compare_runs(runs, output=tmp_path / "out", resamples=200, console=quiet())
    beside = json.loads((tmp_path / "out" / "comparison.json").read_text())["against_teacher"]
    same = [n == 6 for words in WORDS["dskd"] for n in words]
    assert beside[1]["exact"] == pytest.approx(100 * np.mean(same))


def test_a_run_without_a_name_says_how_many_it_is(methods: dict[str, list[Path]]) -> None:
    named = [pooled(open_trainings(run.partition("=")[2])).name for run in asked(methods, sft=3, dskd=1)]
    assert named == ["sft_0 and 2 more", "dskd_0"]


def test_names(tmp_path: Path) -> None:
    assert named_folders("a") == (None, ["a"])
    assert named_folders("x=a,b") == ("x", ["a", "b"])
    assert named_folders("a,b") == (None, ["a", "b"])
    for name in ("c,d", "e=f"):
        (tmp_path / name).mkdir()
        assert named_folders(str(tmp_path / name)) == (None, [str(tmp_path / name)])
    assert named_folders(f"x={tmp_path}/c,d") == ("x", [f"{tmp_path}/c,d"])


@pytest.mark.parametrize("run", ["a,,b", "a,", "x=", "a,a", "x=a,./a"])
def test_bad_names(run: str) -> None:
    with pytest.raises(UserError, match="name each training run once"):
        named_folders(run)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"words": [1] * 6, "seeds": (10,)}, r"different seeds \(10, 20 against 10\)"),
        ({"words": [1] * 5}, "answer different prompts"),
        ({"words": [1] * 6, "prompt": "other {}"}, "differ in the prompt with index 0"),
        ({"words": [], "seeds": ()}, "other: has no predictions"),
    ],
)
def test_runs_that_answer_something_else(
    methods: dict[str, list[Path]], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    other = make_run(tmp_path / "other", **changed)
    for place in (0, 1):
        runs = asked(methods, sft=2, dskd=2)
        runs[place] += f",{other}"
        with pytest.raises(UserError, match=message):
            compare_runs(runs, output=tmp_path / "out", console=quiet())
