"""Progress of fits and tests whose output no terminal shows."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from tiny_runs import write_config

from dskd_lightning.callbacks import ProgressLines
from dskd_lightning.cli.main import main


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def trainer(**changes: Any) -> Any:
    values = {
        "global_step": 0, "estimated_stepping_batches": 100, "max_epochs": 2, "current_epoch": 0,
        "world_size": 2, "callbacks": [],
        "callback_metrics": {}, "num_val_batches": [4], "num_test_batches": [10], "sanity_checking": False,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def test_a_fit_tells_step_loss_speed_and_time_left() -> None:
    clock, state = _Clock(), trainer(global_step=20)  # resumed
    lines = ProgressLines(seconds=1e6, clock=clock)
    lines._trainer = state
    batch: Any = SimpleNamespace(student=SimpleNamespace(input_ids=torch.zeros(4, 50)))
    lines.on_train_start(state, None)
    clock.now += 2
    assert lines.line() == "fit: step 20 of 100, epoch 1 of 2, 2 s so far"
    for _ in range(10):
        clock.now += 1  # waiting for data isn't computing
        lines.on_train_batch_start(state, None, batch, 0)
        clock.now += 1
        state.global_step += 1
        state.callback_metrics = {"train/loss": torch.tensor(2.34567)}
        lines.on_train_batch_end(state, None, None, batch, 0)
    # 22 s for 10 steps of 400 tokens that took 1 s each; 70 steps are left.
    assert lines.line() == "fit: step 30 of 100, epoch 1 of 2, loss 2.346, 400 tokens/s, 2 min 34 s left"
    lines.on_validation_start(state, None)
    clock.now += 3
    lines.on_validation_batch_end(state, None, None, batch, 0)
    assert lines.line() == "validation: batch 1 of 4, 9 s left"
    lines.on_validation_end(state, None)
    assert lines.line().startswith("fit: step 30")
    lines.on_train_end(state, None)
    assert lines.line() == ""


def test_an_unknown_end_is_not_guessed() -> None:
    clock, state = _Clock(), trainer(estimated_stepping_batches=float("inf"), max_epochs=-1)
    lines = ProgressLines(seconds=1e6, clock=clock)
    lines._trainer = state
    lines.on_train_start(state, None)
    clock.now += 65
    state.global_step = lines._fit.done = 3  # type: ignore[union-attr]
    assert lines.line() == "fit: step 3, 1 min 5 s so far"
    lines.teardown(state, None, "fit")


def test_test_batches_are_counted_until_the_responses_begin() -> None:
    clock, state = _Clock(), trainer()
    lines = ProgressLines(seconds=1e6, clock=clock)
    lines._trainer = state
    lines.on_test_start(state, None)
    for _ in range(5):
        clock.now += 2
        lines.on_test_batch_end()
    assert lines.line() == "test: batch 5 of 10, 10 s left"
    for _ in range(5):
        lines.on_test_batch_end()
    assert lines.line() == ""


def test_runs_without_a_terminal_show_lines(model_folder, tmp_path, capsys) -> None:
    student = model_folder()
    config = write_config(tmp_path, student, model_folder(), **{"trainer.enable_progress_bar": True})
    capsys.readouterr()
    assert main(["fit", "--config", str(config)]) == 0
    said = capsys.readouterr()
    steps = re.findall(
        r"^fit: step (\d+) of (\d+), epoch \d of 2, loss [\d.]+, [\d,]+ tokens/s, .* (?:left|so far)$",
        said.err,
        re.M,
    )
    assert steps[0] == ("1", "8")
    assert steps[-1] == ("8", "8")
    assert "\r" not in said.out + said.err
    assert main(["test", "--config", str(config)]) == 0
    assert re.search(r"^Greedy responses: 4 of 4 prompts \(100%\), ", capsys.readouterr().err, re.M)
