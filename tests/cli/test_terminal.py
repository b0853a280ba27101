"""Nothing that models, files or servers say steers the terminal, wherever it is shown."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from dskd_lightning.callbacks import sample_fidelity
from dskd_lightning.cli import chat_command, judge_command, planning_commands
from dskd_lightning.comparison.compare_runs import compare_runs
from dskd_lightning.comparison.judge import JudgeSummary
from dskd_lightning.data.preview import (
    DataPreview,
    FilePreview,
    Lengths,
    Reading,
    RecordPreview,
    StagePreview,
    TurnReading,
)
from dskd_lightning.data.preview_rendering import as_terminal
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.chat import Speaker
from dskd_lightning.files import write_object
from dskd_lightning.launch.card import _cell
from dskd_lightning.planning.doctor import Finding
from dskd_lightning.runs.predictions import Prediction
from dskd_lightning.runs.samples import SampledResponse
from dskd_lightning.runs.tables import CompletionTable
from dskd_lightning.study import summary, worker

COMMANDS = ("\x1b[2J", "\x1b]0;title\x07", "\u202e")
HOSTILE = f"said {''.join(COMMANDS)}"


def check(shown: str, times: int = 1) -> None:
    assert shown.count("said") >= times
    assert not [command for command in COMMANDS if command in shown]


def terminal(is_terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, color_system=None, width=200)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_completions() -> None:
    console = terminal()
    console.print(CompletionTable([HOSTILE], {HOSTILE: [HOSTILE]}).rich(HOSTILE))
    check(written(console), 4)


def test_samples() -> None:
    console = terminal()
    sample = SampledResponse(HOSTILE, (HOSTILE,), (-1.0,), (-1.0,))
    console.print(sample_fidelity._table([sample], "samples at step 1"))
    check(written(console), 2)


def test_a_comparison(tmp_path) -> None:
    for name, response in (("a", "yes"), ("b", "no")):
        (tmp_path / name / "predictions").mkdir(parents=True)
        lines = [Prediction(i, "p", ("yes",), response, seed=1).to_json() + "\n" for i in range(3)]
        (tmp_path / name / "predictions" / "seed_1.jsonl").write_text("".join(lines))
        write_object(tmp_path / name / "metrics.json", {HOSTILE: 1.0 if name == "a" else 2.0})
    console = terminal()
    runs = [f"{HOSTILE}{name}={tmp_path / name}" for name in ("a", "b")]
    compare_runs(runs, fail_if=["rougeL drops > 0"], output=tmp_path / "out", resamples=50, console=console)
    check(written(console), 3)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_chat(monkeypatch, is_terminal: bool) -> None:
    nothing: Any = None
    monkeypatch.setattr(Speaker, "answer", lambda *_: HOSTILE)
    console = terminal(is_terminal)
    chat_command.chat([Speaker(HOSTILE, nothing, nothing)], ["hello", f"/{HOSTILE}"], None, console)
    check(written(console), 3)


def test_a_judges_server(monkeypatch, tmp_path, capsys) -> None:
    lines = Prediction(0, "p", ("yes",), "a", seed=1).to_json() + "\n"
    for name in ("a", "b"):
        (tmp_path / name / "predictions").mkdir(parents=True)
        (tmp_path / name / "predictions" / "seed_1.jsonl").write_text(lines)
    monkeypatch.setattr(judge_command, "judge_pairs", lambda *_, **__: JudgeSummary((), HOSTILE))
    runs = [str(tmp_path / name) for name in ("a", "b")]
    options = {"output": "v", "api_key_variable": None, "max_requests": None, "max_tokens": None}
    assert judge_command.judge_runs(*runs, "http://127.0.0.1:1", "m", **options) == 1
    check(capsys.readouterr().out)


def test_a_doctor(monkeypatch, capsys) -> None:
    monkeypatch.setattr(planning_commands, "examine", lambda *_: [Finding("look", "data", HOSTILE)])
    assert planning_commands.run_doctor([]) == 0
    check(capsys.readouterr().out)


def test_a_studys_worker_and_place(monkeypatch, tmp_path, capsys) -> None:
    def fail(*_: object) -> None:
        raise UserError(HOSTILE)

    monkeypatch.setattr(worker, "_run", fail)
    monkeypatch.setattr(worker, "end_with_parent", lambda _: None)
    with pytest.raises(SystemExit):
        worker.run_variant([], str(tmp_path), "", train=True, test=True)
    check(capsys.readouterr().err)
    summary.summarise(tmp_path / HOSTILE, {}, report=False)
    check(capsys.readouterr().out)


def test_a_preview_of_data() -> None:
    turn, lengths = TurnReading(HOSTILE, (HOSTILE,), (-1,), ("none",)), Lengths(1, 1, 1, 1, 0.5)
    record = RecordPreview(HOSTILE, (Reading(3, (turn,)),) * 2)
    stage = StagePreview({HOSTILE: 1}, (lengths,) * 2, (FilePreview(HOSTILE, 1, (record,)),))
    console = terminal()
    console.print(as_terminal(DataPreview((HOSTILE, HOSTILE), {"train": stage})))
    check(written(console), 9)


def test_a_card() -> None:
    check(_cell(HOSTILE))
