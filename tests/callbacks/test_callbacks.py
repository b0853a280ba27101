"""The CSV log over a resumed run, and the early warnings."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from dskd_lightning.callbacks import ResumableCSVLogger, TrainingCost, TrainingMonitor
from dskd_lightning.callbacks.completions import log_completions
from dskd_lightning.evaluation.representation import effective_rank
from dskd_lightning.runs.tables import CompletionTable


def rows(folder):
    with (folder / "metrics.csv").open() as stream:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(stream)]


def test_resumed_log_keeps_earlier_rows(tmp_path):
    first = ResumableCSVLogger(tmp_path)
    first.log_metrics({"loss": 1.0}, 0)
    first.save()
    second = ResumableCSVLogger(tmp_path, resume=True)
    second.log_metrics({"loss": 0.5, "new": 2.0}, 1)
    second.save()
    assert [row["loss"] for row in rows(tmp_path)] == ["1.0", "0.5"]
    third = ResumableCSVLogger(tmp_path)
    third.log_metrics({"loss": 3.0}, 0)
    third.save()
    assert [row["loss"] for row in rows(tmp_path)] == ["3.0"]


def test_steps_that_run_again_replace_their_rows(tmp_path):
    first = ResumableCSVLogger(tmp_path)
    for step in range(6):
        first.log_metrics({"train/loss": float(step)}, step)
    first.save()
    second = ResumableCSVLogger(tmp_path, resume=True, retrain=True)
    second.log_metrics({"train/loss": 40.0}, 4)
    second.save()
    with (tmp_path / "metrics.csv").open() as stream:
        rows = [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(stream)]
    assert rows == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_effective_rank():
    assert float(effective_rank(torch.eye(5))) == pytest.approx(5.0, rel=1e-5)
    assert float(effective_rank(torch.ones(5, 5))) == pytest.approx(1.0, rel=1e-3)


def test_collapsed_projector_is_named_once():
    module = torch.nn.ModuleDict({"objectives": torch.nn.ModuleList([torch.nn.Linear(64, 64)])})
    with torch.no_grad():
        module["objectives"][0].weight.fill_(1.0)
    monitor = TrainingMonitor(min_projector_rank=0.05)
    with pytest.warns(UserWarning, match=r"objectives\.0\.weight has collapsed"):
        monitor._check_projectors(module)
    monitor._check_projectors(module)  # a second warning would be an error here


def test_vanished_entropy_warns():
    trainer = SimpleNamespace(callback_metrics={"train/student_entropy": torch.tensor(0.001)})
    with pytest.warns(UserWarning, match="near certainty"):
        TrainingMonitor()._check_entropy(trainer)


def test_training_cost_counts_on_where_a_run_resumes(tmp_path, monkeypatch):
    now = iter([100.0, 107.0, 200.0, 203.0])
    monkeypatch.setattr("dskd_lightning.callbacks.training_cost.time.perf_counter", lambda: next(now))
    trainer = SimpleNamespace(global_step=4, world_size=1, is_global_zero=True)
    first = TrainingCost(tmp_path)
    first.setup(trainer, None, "fit")
    state = first.state_dict()
    assert state == {"seconds": 7.0}
    resumed = TrainingCost(tmp_path)
    resumed.setup(trainer, None, "fit")
    resumed.load_state_dict(state)
    resumed.on_fit_end(trainer, None)
    cost = json.loads((tmp_path / "training.json").read_text())
    assert cost["seconds"] == 10.0
    assert (cost["steps"], cost["devices"]) == (4, 1)
    assert cost["peak_bytes"] > 2**20
    other = TrainingCost(tmp_path)
    other.setup(trainer, None, "test")
    assert other.state_dict() == {"seconds": 0.0}


def test_completions_go_where_a_logger_shows_text():
    table = CompletionTable(["<b>"], {"student": ["a|b"]})
    seen = []

    class Board(TensorBoardLogger):
        experiment = SimpleNamespace(add_text=lambda *args: seen.append(args))

    class WeightsAndBiases(WandbLogger):
        def log_table(self, key, **given):
            seen.append((key, given))

    class MLflow(MLFlowLogger):
        experiment = SimpleNamespace(log_text=lambda *args: seen.append(args))
        run_id = "r1"

    loggers = [object.__new__(kind) for kind in (Board, WeightsAndBiases, MLflow)]
    for logger in [*loggers, CSVLogger("unused")]:
        log_completions(logger, table, 7)
    assert seen == [
        ("completions", table.markdown(), 7),
        ("completions", {"columns": ["prompt", "student"], "data": [["<b>", "a|b"]], "step": 7}),
        ("r1", table.markdown(), "completions/step_7.md"),
    ]
