from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dskd_lightning.comparison import bootstrap
from dskd_lightning.comparison.compare import compare_all
from dskd_lightning.comparison.compare_runs import compare_runs
from dskd_lightning.comparison.gate import Measured, parse_condition
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation import scores
from dskd_lightning.evaluation.scores import prompt_metric
from dskd_lightning.runs import run_folder
from dskd_lightning.runs.heartbeat import Heartbeat, Progress
from dskd_lightning.runs.predictions import Prediction
from dskd_lightning.runs.run_folder import RunFolder

ANSWER = "one two three four five six"


def make_run(
    folder: Path, words: list[int], seeds=(10, 20), metrics=None, prompt="prompt {}", start=0
) -> Path:
    """A run whose response to each prompt holds the first ``words`` words of the reference."""
    (folder / "predictions").mkdir(parents=True)
    for seed in seeds:
        lines = [
            Prediction(i, prompt.format(i), (ANSWER,), " ".join(ANSWER.split()[:n]), seed, n).to_json()
            for i, n in enumerate(words, start)
        ]
        (folder / "predictions" / f"seed_{seed}.jsonl").write_text("\n".join(lines) + "\n")
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [
        make_run(tmp_path / "base", [2, 3, 2, 3, 4, 2, 3, 2], metrics={"loss": 2.0}),
        make_run(tmp_path / "good", [4, 5, 5, 6, 4, 5, 6, 5], metrics={"loss": 1.5}),
        make_run(tmp_path / "bad", [1, 1, 0, 1, 4, 1, 4, 1], metrics={"loss": 2.5}),
    ]


def test_outcomes_and_counts(runs) -> None:
    good, bad = compare_all([RunFolder.read(run) for run in runs], prompt_metric("rougeL"))
    assert (good.wins, good.ties, good.losses, good.outcome) == (7, 1, 0, "better")
    assert (bad.wins, bad.ties, bad.losses, bad.outcome) == (
        1,
        1,
        6,
        "undecided" if bad.adjusted_p_value >= 0.05 else "worse",
    )
    assert good.test.mean == pytest.approx(good.candidate_scores.mean - good.baseline_scores.mean)
    assert good.adjusted_p_value >= good.test.p_value
    assert [change.difference for change in bad.regressions] == sorted(c.difference for c in bad.regressions)
    assert bad.regressions[0].index == 2  # the empty response
    assert good.candidate_scores.seed_deviation == 0.0


def test_report_files_and_exit_codes(runs, tmp_path) -> None:
    def code(*fail_if: str) -> int:
        return compare_runs(runs, fail_if=fail_if, output=tmp_path / "out", resamples=500, console=quiet())

    assert code() == 0
    assert code("rougeL drops > 1") == 1
    assert code("rougeL drops > 90", "loss > 9") == 0
    assert code("loss rises > 20%") == 1
    assert code("exact_match drops > 0") == 0
    summary = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "crc32" in summary
    assert [candidate["name"] for candidate in summary["candidates"]] == ["good", "bad"]
    regressions = [
        json.loads(line) for line in (tmp_path / "out" / "regressions.jsonl").read_text().split("\n")[:-1]
    ]
    assert len(regressions) == 6
    assert regressions[0]["candidate_response"] == ""
    assert (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out" / "plots" / "difference.png").read_bytes().startswith(b"\x89PNG")


def test_results_of_different_models_are_warned_of(runs, tmp_path, caplog) -> None:
    (runs[1] / "metrics.json").write_text('{"loss": 1.5, "model": {"weights": "a"}}')
    (runs[1] / "predictions" / "settings.json").write_text('{"model": "b"}')
    compare_runs(runs[:2], output=tmp_path / "out", resamples=100, console=quiet())
    assert f"{runs[1]}: predictions are of another model than metrics.json" in caplog.text


def test_named_runs(runs, tmp_path) -> None:
    compare_runs([f"A={runs[0]}", f"B={runs[1]}"], output=tmp_path / "out", resamples=100, console=quiet())
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["baseline"] == "A"
    with pytest.raises(UserError, match="different names"):
        compare_runs([runs[0], runs[0]], output=tmp_path / "x")
    with pytest.raises(UserError, match="at least two runs"):
        compare_runs(runs[:1], output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": [1, 2, 3]}, "answer different prompts: 5 are in one of them only, first index 3"),
        ({"words": [1] * 8, "prompt": "other {}"}, "differ in the prompt with index 0"),
        ({"words": [1] * 8, "seeds": (10,)}, r"different seeds \(10, 20 against 10\)"),
        ({"words": [], "seeds": ()}, "has no predictions"),
    ],
)
def test_runs_that_cannot_be_compared(runs, tmp_path, options, message) -> None:
    other = make_run(tmp_path / "other", **options)
    with pytest.raises(UserError, match=message):
        compare_runs([runs[0], other], output=tmp_path / "out", console=quiet())


def test_duplicated_and_mixed_predictions(runs, tmp_path) -> None:
    file = runs[1] / "predictions" / "seed_10.jsonl"
    lines = file.read_text()
    file.write_text(lines + lines.split("\n")[0] + "\n")
    with pytest.raises(UserError, match="more than once"):
        compare_runs(runs, output=tmp_path / "out", console=quiet())
    file.write_text(lines + (runs[1] / "predictions" / "seed_20.jsonl").read_text())
    with pytest.raises(UserError, match=r"more than once|mixes predictions"):
        compare_runs(runs, output=tmp_path / "out", console=quiet())
    file.write_text("\n".join(lines.split("\n")[1:]))
    with pytest.raises(UserError, match="seeds answer different prompts"):
        compare_runs(runs, output=tmp_path / "out", console=quiet())


@pytest.mark.parametrize(
    ("text", "baseline", "candidate", "p_value", "fails"),
    [
        ("rougeL drops > 1", 20.0, 18.9, 0.5, True),
        ("rougeL drops > 1", 20.0, 19.0, 0.0, False),
        ("ROUGEL DROPS>1", 20.0, 30.0, 0.0, False),
        ("rougeL drops > 5%", 20.0, 18.9, 0.5, True),
        ("rougeL drops > 10 %", 20.0, 18.9, 0.5, False),
        ("rougeL drops > 1 significantly", 20.0, 18.0, 0.06, False),
        ("rougeL drops > 5% significantly", 20.0, 18.0, 0.04, True),
        ("val/loss rises > .5", 1.0, 1.6, None, True),
        ("loss>2.5e0", None, 2.6, None, True),
        ("agreement <= 0.5", None, 0.5, None, True),
        ("agreement >= 0.6", 0.9, 0.5, None, False),
    ],
)
def test_conditions(text, baseline, candidate, p_value, fails) -> None:
    assert parse_condition(text).holds(Measured(baseline, candidate, p_value)) is fails


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rougeL",
        "rougeL falls > 1",
        "rougeL drops < 1",
        "drops > 1",
        "rougeL drops > x",
        "rougeL drops > 1 2",
        "rougeL > 1%",
    ],
)
def test_conditions_that_cannot_be_read(text) -> None:
    with pytest.raises(UserError, match="cannot be read; write"):
        parse_condition(text)


def test_conditions_that_cannot_be_checked(runs, tmp_path) -> None:
    def check(condition: str) -> None:
        compare_runs(runs[:2], fail_if=[condition], output=tmp_path / "out", resamples=50, console=quiet())

    with pytest.raises(UserError, match="must be positive"):
        check("rougeL drops > -1")
    with pytest.raises(UserError, match=r"has no kl; it has .*loss.*rougeL"):
        check("kl > 1")
    with pytest.raises(UserError, match="no p-value"):
        check("loss rises > 1 significantly")
    with pytest.raises(UserError, match="unknown metric 'bleu'"):
        compare_runs(runs[:2], metric="bleu", output=tmp_path / "out")


def test_run_folder_parts(tmp_path) -> None:
    run = make_run(tmp_path / "r", [1, 2])
    empty = RunFolder.read(run)
    assert (empty.metrics, empty.curves, empty.config, empty.efficiency, empty.alignments) == (
        {},
        {},
        None,
        None,
        (),
    )
    (run / "metrics.csv").write_text("epoch,step,loss,val\n0,1,2.5,\n0,2,,nan\n1,3,2.0,7\n")
    (run / "alignments").mkdir()
    (run / "alignments" / "a.json").write_text(
        '{"student": ["x"], "teacher": ["y", "z"], "weights": [[0.2, 0.8]]}'
    )
    full = RunFolder.read(run)
    assert full.curves == {"loss": [(1.0, 2.5), (3.0, 2.0)], "val": [(3.0, 7.0)]}
    assert full.alignments[0].weights == ((0.2, 0.8),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", "{", "malformed JSON"),
        ("metrics.json", "[]", "must be a JSON object"),
        ("metrics.json", '{"loss": 1' + "0" * 4000 + "}", "a number is too large"),
        ("metrics.json", '{"loss": 1' + "0" * 5000 + "}", "malformed JSON"),
        ("metrics.json", "[" * 100_000, "nested too deep"),
        ("metrics.csv", "step,loss\n1,x\n", "metrics.csv:2: not a number"),
        ("metrics.csv", "step,loss\n1,\udcff\n", "metrics.csv: is damaged"),
        ("metrics.csv", "step,loss\n1,2,3\n", "more columns than the header"),
        ("training.json", '{"seconds": "x"}', "training.json: is damaged"),
        ("efficiency.json", '{"parameters": "many"}', "efficiency.json: is damaged"),
        ("teacher_efficiency.json", '{"parameters": [1]}', "teacher_efficiency.json: is damaged"),
        ("representation.json", '{"after": 3}', "representation.json: is damaged"),
        ("representation.json", '{"after": {"cka": "x"}}', "representation.json: is damaged"),
        (
            "representation.json",
            '{"projectors": {"p": {"singular_values": ["x"]}}}',
            "representation.json: is damaged",
        ),
        ("environment.json", "\udcff", "malformed JSON"),
        ("alignments/a.json", '{"student": ["x"], "teacher": [], "weights": [[1]]}', "1 rows of 0"),
        ("alignments/a.json", "{}", "needs student, teacher and weights"),
    ],
)
def test_damaged_run_folders(tmp_path, name, content, message) -> None:
    run = make_run(tmp_path / "r", [1])
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        RunFolder.read(run)
    with pytest.raises(UserError, match="no such run folder"):
        RunFolder.read(tmp_path / "nowhere")


def test_scoring_and_reading_tell_how_far_they_are(tmp_path, monkeypatch) -> None:
    told: list[tuple[str, int, int | None]] = []

    class Told(Progress):
        def __exit__(self, *error) -> None:
            told.append((self.what, self.done, self.total))
            super().__exit__(*error)

    lines: list[str] = []

    class Said(Heartbeat):
        def __enter__(self):
            lines.append(self.line())
            return super().__enter__()

    monkeypatch.setattr(scores, "Progress", Told)
    monkeypatch.setattr(bootstrap, "Heartbeat", Said)
    monkeypatch.setattr(run_folder, "Heartbeat", Said)
    runs = [make_run(tmp_path / name, [1, 2, 3]) for name in ("a", "b")]
    assert compare_runs(runs, output=tmp_path / "out", resamples=100, console=quiet()) == 0
    assert told[:2] == [("rougeL of a", 6, 6), ("rougeL of b", 6, 6)]  # others for the report follow
    assert lines.count("100 resamples of 3 differences") == 1
    assert [line for line in lines if str(tmp_path / "b" / "predictions" / "seed_20.jsonl") in line]
