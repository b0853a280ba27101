"""Resuming with a plain Trainer: loaders of one's own, and schedules whose end has moved."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_runs import write_data
from torch.optim import lr_scheduler

import dskd_lightning as dl
from dskd_lightning.callbacks import LastCheckpoint
from dskd_lightning.training.resuming import settle_progress


class _Notes(L.Callback):
    """Learning rate and examples of each batch; may stop the run as a kill would."""

    def __init__(self, stop_at: int = -1) -> None:
        self.seen: list[tuple[float, tuple[int, ...]]] = []
        self.stop_at = stop_at

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.optimizers[0].param_groups[0]["lr"], tuple(batch.examples.tolist())))

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.stop_at:
            raise RuntimeError("killed")


def _fit(
    model_folder: Any,
    folder: Path,
    notes: L.Callback,
    epochs: int = 2,
    path: Any = None,
    loaders: bool = False,
    schedule: Any = None,
    **options: Any,
) -> L.Trainer:
    student = dl.StudentSpec(model_folder(seed=1))
    module = dl.DistillationModule(
        student, dl.SFTObjective(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
        lr_scheduler=schedule, warmup_ratio=0.0,
    )  # fmt: skip
    data = dl.InstructionDataModule(
        str(write_data(folder / "data.jsonl")), student=student,
        max_length=96, max_prompt_length=40, batch_size=5, cache_dir=str(folder / "cache"),
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        max_epochs=epochs, callbacks=[notes, LastCheckpoint(folder, every=1)], **options,
    )  # fmt: skip
    if loaders:
        trainer.fit(module, train_dataloaders=data.train_dataloader(), ckpt_path=path, weights_only=True)
    else:
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    return trainer


@pytest.mark.parametrize("loaders", [False, True], ids=["data module", "loader"])
def test_a_plain_trainer_resumes_in_mid_epoch(model_folder, tmp_path, loaders) -> None:
    whole, cut, resumed = _Notes(), _Notes(stop_at=3), _Notes()
    _fit(model_folder, tmp_path, whole, loaders=loaders)
    with pytest.raises(RuntimeError, match="killed"):
        _fit(model_folder, tmp_path, cut, loaders=loaders)
    _fit(model_folder, tmp_path, resumed, path=tmp_path / "last.ckpt", loaders=loaders)
    assert len(whole.seen) == 10
    assert resumed.seen == whole.seen[3:]


SCHEDULES: dict[str, Any] = {
    "default": None,
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=7),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 1 - step / 20),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 9, power=2),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.StepLR(o, 2)], [4]
    ),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 5]),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_goes_on_where_it_was(model_folder, tmp_path, schedule) -> None:
    """Killed in the first epoch, and then in the second; the rates aren't constant."""
    options, path = {"schedule": SCHEDULES[schedule]}, tmp_path / "last.ckpt"
    whole, resumed = _Notes(), _Notes()
    expected = _fit(model_folder, tmp_path, whole, **options)
    path.unlink()
    for stop_at, start in ((4, None), (6, path)):
        with pytest.raises(RuntimeError, match="killed"):
            _fit(model_folder, tmp_path, _Notes(stop_at), path=start, **options)
    found = _fit(model_folder, tmp_path, resumed, path=path, **options)
    assert resumed.seen == whole.seen[6:]
    assert len({rate for rate, _ in whole.seen}) > 3
    torch.testing.assert_close(found.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0)
    states = [trainer.lr_scheduler_configs[0].scheduler.state_dict() for trainer in (found, expected)]
    assert _plain(states[0]) == _plain(states[1])


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not callable(value)}


class _SavesInSteps(L.Callback):
    """Saves and stops before a batch of the run, counted from this start of it."""

    def __init__(self, path: Path, stop_at: int = -1, save: bool = True) -> None:
        self.path, self.stop_at, self.save, self.seen = path, stop_at, save, 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.seen == self.stop_at:
            if self.save:
                trainer.save_checkpoint(self.path)
            raise RuntimeError("killed")
        self.seen += 1


@pytest.mark.parametrize("save", [False, True], ids=["killed", "saved within a step"])
@pytest.mark.parametrize("chain", [[3, 2], [1], [4, 1, 1]], ids=str)
def test_no_batch_of_a_step_that_was_cut_is_lost(model_folder, tmp_path, chain, save) -> None:
    accumulation: Any = {"accumulate_grad_batches": 2, "epochs": 2}
    folders = [tmp_path / "whole", tmp_path / "cut"]
    for folder in folders:
        folder.mkdir()
    whole = _fit(model_folder, folders[0], _SavesInSteps(tmp_path), **accumulation)
    path = folder / "last.ckpt"
    for stop_at in chain:
        start = path if path.exists() else None
        with pytest.raises(RuntimeError, match="killed"):
            _fit(model_folder, folder, _SavesInSteps(path, stop_at, save), path=start, **accumulation)
    start = path if path.exists() else None
    resumed = _fit(model_folder, folder, _SavesInSteps(path), path=start, **accumulation)
    assert resumed.global_step == whole.global_step == 6
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    counters = [t.fit_loop.epoch_loop.state_dict() for t in (resumed, whole)]
    assert counters[0] == counters[1]


def test_a_raised_end_takes_the_new_schedules_rate_at_once(model_folder, tmp_path) -> None:
    first, second = _Notes(), _Notes()
    _fit(model_folder, tmp_path, first, epochs=1)
    assert first.seen[-1][0] == 0  # where it ended, the cosine was at its end
    _fit(model_folder, tmp_path, second, epochs=2, path=tmp_path / "last.ckpt")
    expected = [0.05 * (1 + math.cos(math.pi * step / 9)) for step in range(5, 10)]
    assert [rate for rate, _ in second.seen] == pytest.approx(expected)


def test_a_default_schedule_without_an_end_is_one_sentence(model_folder, tmp_path) -> None:
    with pytest.raises(dl.UserError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        _fit(model_folder, tmp_path, _Notes(), epochs=-1)


def _progress(ready: int, processed: int, completed: int) -> dict[str, Any]:
    counters = {"ready": ready, "started": ready, "processed": processed, "completed": completed}
    return {"total": dict(counters), "current": dict(counters)}


def _loop(epochs: dict[str, Any], batches: dict[str, Any], last: bool) -> dict[str, Any]:
    steps = {"step": _progress(3, 3, 3), "zero_grad": _progress(3, 3, 3)}
    return {
        "state_dict": {"combined_loader": [{"epoch": 0, "position": 99, "key": ""}]},
        "epoch_progress": epochs,
        "epoch_loop.state_dict": {"_batches_that_stepped": 99},
        "epoch_loop.batch_progress": {**batches, "is_last_batch": last},
        "epoch_loop.scheduler_progress": _progress(3, 3, 3),
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": steps},
    }


@pytest.mark.parametrize(
    ("epochs", "batches", "last", "by_steps", "done", "ready"),
    [
        (_progress(1, 0, 0), _progress(4, 3, 3), True, False, 3, 1),  # before the last batch
        (_progress(1, 0, 0), _progress(3, 3, 2), False, False, 3, 1),  # at a batch's end
        (_progress(1, 0, 0), _progress(3, 3, 3), False, True, 3, 1),  # after a validation
        (_progress(1, 1, 0), _progress(3, 3, 3), False, False, 3, 1),  # an epoch that was cut short
        (_progress(1, 1, 0), _progress(3, 3, 3), True, True, 0, 2),  # a whole one, where steps count
    ],
)
def test_every_place_becomes_the_one_form(epochs, batches, last, by_steps, done, ready) -> None:
    loop = copy.deepcopy(_loop(epochs, batches, last))
    settle_progress(loop, steps=3, accumulate=1, by_steps=by_steps)
    expected = {"ready": done, "started": done, "processed": done, "completed": done - 1}
    assert loop["epoch_loop.batch_progress"]["current"] == expected
    assert loop["epoch_loop.batch_progress"]["total"]["completed"] == 2
    assert not loop["epoch_loop.batch_progress"]["is_last_batch"]
    epoch = {"ready": ready, "started": ready, "processed": ready - 1, "completed": ready - 1}
    assert loop["epoch_progress"]["current"] == epoch
    assert loop["epoch_loop.state_dict"]["_batches_that_stepped"] == 2
    assert loop["state_dict"]["combined_loader"][0]["position"] == done


def test_a_whole_epoch_stays_where_epochs_count() -> None:
    loop = _loop(_progress(1, 1, 0), _progress(3, 3, 3), True)
    before = copy.deepcopy(loop)
    settle_progress(loop, steps=3, accumulate=1, by_steps=False)
    assert loop == before
