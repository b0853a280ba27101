"""The CSV log over a resumed run, and the early warnings."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from dskd_lightning.callbacks import ResumableCSVLogger, TrainingCost, TrainingMonitor, csv_logger
from dskd_lightning.callbacks.completions import log_completions
from dskd_lightning.errors import UserError
from dskd_lightning.functional.spectrum import effective_rank
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


def test_an_earlier_log_stays_until_new_rows_are_saved(tmp_path):
    first = ResumableCSVLogger(tmp_path)
    first.log_metrics({"loss": 1.0}, 0)
    first.save()
    before = (tmp_path / "metrics.csv").read_bytes()
    for options in ({"resume": True, "retrain": True}, {"resume": True}, {}):
        killed = ResumableCSVLogger(tmp_path, **options)
        _ = killed.experiment  # Lightning makes it before the models are loaded
        killed.finalize("failed")
        assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_full_disk_leaves_the_rows_that_were_there(tmp_path, monkeypatch):
    first = ResumableCSVLogger(tmp_path)
    for step in range(5):
        first.log_metrics({"loss": float(step)}, step)
    first.save()
    first.log_metrics({"loss": 5.0}, 5)
    real, calls = io.FileIO.write, []

    def full(file: io.FileIO, data: bytes) -> int:
        if calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        calls.append(real(file, data[:2]))
        return calls[0]

    with monkeypatch.context() as patch:
        opened = open

        class Full(io.FileIO):
            write = full

        def open_(path, mode="r", *arguments, **options):
            return Full(path, mode) if mode == "ab" else opened(path, mode, *arguments, **options)

        patch.setattr(Path, "open", lambda path, mode="r", *a, **o: open_(path, mode, *a, **o))
        with pytest.raises(OSError, match="No space"):
            first.save()
    assert [row["loss"] for row in rows(tmp_path)] == ["0.0", "1.0", "2.0", "3.0", "4.0"]

    resumed = ResumableCSVLogger(tmp_path, resume=True)
    resumed.log_metrics({"loss": 5.0, "new": 1.0}, 5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(UserError, match="No space left"):
            resumed.save()
    assert len(rows(tmp_path)) == 5
    resumed.save()
    assert [row["loss"] for row in rows(tmp_path)] == ["0.0", "1.0", "2.0", "3.0", "4.0", "5.0"]


def test_rows_are_appended_where_the_columns_stay(tmp_path):
    log = ResumableCSVLogger(tmp_path)
    log.log_metrics({"b": 1.0}, 0)
    log.save()
    inode = (tmp_path / "metrics.csv").stat().st_ino
    log.log_metrics({"b": 2.0}, 1)
    log.save()
    assert (tmp_path / "metrics.csv").stat().st_ino == inode
    log.log_metrics({"a": 3.0}, 2)
    log.save()
    assert rows(tmp_path) == [
        {"b": "1.0", "step": "0"},
        {"b": "2.0", "step": "1"},
        {"a": "3.0", "step": "2"},
    ]


@pytest.mark.parametrize(
    "content",
    [b"step,loss\n0,\xff\n", b"step,loss\n0,1,2\n", b"step,loss\nx,1\n", b'step,loss\n0,"1\n'],
    ids=["bytes", "columns", "step", "quote"],
)
def test_a_damaged_log_is_named_before_training(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.csv: is damaged"):
        ResumableCSVLogger(tmp_path, resume=True)


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"loss,step\n1.5,0\n0.")
    log = ResumableCSVLogger(tmp_path, resume=True)
    log.log_metrics({"loss": 0.5}, 1)
    log.save()
    assert rows(tmp_path) == [{"loss": "1.5", "step": "0"}, {"loss": "0.5", "step": "1"}]


def test_a_changed_digit_of_a_log_is_seen(tmp_path):
    log, path = ResumableCSVLogger(tmp_path), tmp_path / "metrics.csv"
    for step, value in enumerate((1.25, 1.5, 1.75)):
        log.log_metrics({"loss": value} if step < 2 else {"loss": value, "new": 1.0}, step)
        log.save()  # written, added to, written anew with one more column
        good = path.read_bytes()
        path.write_bytes(good.replace(b"1.25", b"1.26"))
        with pytest.raises(UserError, match=r"metrics\.csv: isn't as it was written .*\.metrics\.csv\.crc32"):
            ResumableCSVLogger(tmp_path, resume=True)
        path.write_bytes(good[:-4])
        with pytest.raises(UserError, match="isn't as it was written"):
            ResumableCSVLogger(tmp_path, resume=True)
        path.write_bytes(good + b"9,9\n"[: 4 if step < 2 else 0])  # added by a process that was then killed
        ResumableCSVLogger(tmp_path, resume=True)
        path.write_bytes(good)
    path.write_bytes(good.replace(b"1.25", b"1.26"))
    (tmp_path / ".metrics.csv.crc32").unlink()
    ResumableCSVLogger(tmp_path, resume=True)


def test_a_kill_before_the_checksum_is_written_leaves_a_log_that_is_read(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    log = ResumableCSVLogger(tmp_path)
    log.log_metrics({"loss": 1.0}, 0)
    log.save()
    for metrics in ({"loss": 2.0}, {"loss": 3.0, "new": 1.0}):  # added to, written anew
        log.log_metrics(metrics, 1)
        with monkeypatch.context() as patch:
            patch.setattr(csv_logger, "write_checksum", killed)
            with pytest.raises(KeyboardInterrupt):
                log.save()
        ResumableCSVLogger(tmp_path, resume=True)
    assert [row["loss"] for row in rows(tmp_path)] == ["1.0", "2.0", "3.0"]


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


@pytest.mark.parametrize(
    ("wait", "steps", "warns"), [(3.0, 30, True), (3.0, 15, False), (0.5, 300, False), (None, 300, False)]
)
def test_waiting_for_batches_is_measured_and_named(wait, steps, warns, monkeypatch) -> None:
    """Steps of 7 s of work; a validation of 1000 s in between counts as neither."""
    now, logged = [0.0], []
    monkeypatch.setattr("dskd_lightning.training.monitor.time.perf_counter", lambda: now[0])
    loader = SimpleNamespace() if wait is None else SimpleNamespace(waited=5.0)
    trainer = SimpleNamespace(
        train_dataloader=loader,
        global_step=0,
        log_every_n_steps=2,
        callback_metrics={},
        callbacks=[],
        estimated_stepping_batches=steps,
    )
    module = SimpleNamespace(log_dict=lambda values, **_: logged.append(values), named_parameters=list)
    batch = SimpleNamespace(student=SimpleNamespace(input_ids=torch.zeros(2, 35)))
    monitor = TrainingMonitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor.on_train_start(trainer, module)
        for step in range(1, steps + 1):
            if wait is not None:
                loader.waited += wait
            now[0] += 7.0 + (wait or 0.0)
            trainer.global_step = step
            monitor.on_train_batch_end(trainer, module, None, batch, step - 1)
            if step == 4:
                now[0] += 1000.0
                monitor.on_validation_end(trainer, module)
    expected = 0.0 if wait is None else wait / (7.0 + wait)
    assert [float(values["monitor/data_wait"]) for values in logged] == pytest.approx(
        [expected] * (steps // 2)
    )
    found = [str(warning.message) for warning in caught]
    assert len(found) == warns
    assert not warns or "waits for its batches 30% of the time" in found[0]


def test_training_cost_counts_on_where_a_run_resumes(tmp_path, monkeypatch):
    now = iter([100.0, 107.0, 200.0, 203.0])
    monkeypatch.setattr("dskd_lightning.callbacks.training_cost.time.perf_counter", lambda: next(now))
    trainer = SimpleNamespace(global_step=4, world_size=1, is_global_zero=True)
    first = TrainingCost(tmp_path)
    first.on_fit_start(trainer, None)
    state = first.state_dict()
    assert state == {"seconds": 7.0}
    resumed = TrainingCost(tmp_path)
    resumed.on_fit_start(trainer, None)
    resumed.load_state_dict(state)
    resumed.on_fit_end(trainer, None)
    cost = json.loads((tmp_path / "training.json").read_text())
    assert cost["seconds"] == 10.0
    assert (cost["steps"], cost["devices"]) == (4, 1)
    assert cost["peak_bytes"] > 2**20
    assert TrainingCost(tmp_path).state_dict() == {"seconds": 0.0}


def test_training_cost_is_without_what_building_the_models_takes(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("dskd_lightning.callbacks.training_cost.time.perf_counter", lambda: clock[0])

    class Module(BoringModel):
        def setup(self, stage):
            clock[0] += 1000  # preparation

        def configure_model(self):
            clock[0] += 100  # a teacher cache is computed here

        def training_step(self, *given):
            clock[0] += 1
            return super().training_step(*given)

    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[TrainingCost(tmp_path)],
    )  # fmt: skip
    trainer.fit(Module())
    assert json.loads((tmp_path / "training.json").read_text())["seconds"] == 3.0


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
