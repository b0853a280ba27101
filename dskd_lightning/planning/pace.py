"""How long the parts of a run take on this machine, measured on a short one."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml

from dskd_lightning.errors import UserError
from dskd_lightning.files import read_if_there, read_object, write_atomic, write_object
from dskd_lightning.launch.configs import config_path
from dskd_lightning.study.log import LOG
from dskd_lightning.study.process import run_process

__all__ = ["TOGETHER", "Pace", "Stopwatch", "batches_of", "measure_pace"]

TOGETHER = 32
"""Responses that are written at once."""
_STEPS = 6
_FILE = "pace.json"
_REMEDY = "run the benchmark again"


@dataclass(frozen=True)
class Pace:
    """Seconds, where nothing is said, with data prepared and the teacher's cache filled.

    Args:
        start: of a process, with loading models and saving checkpoints, beside what follows.
        step: an optimiser step.
        validation: of the whole validation set.
        test: likelihoods of the whole test set, and what its model costs to run.
        responses: to `TOGETHER` prompts at once.
        batches: how many batches an epoch has.
    """

    start: float
    step: float
    validation: float
    test: float
    responses: float
    batches: int


class Stopwatch(L.Callback):
    """Writes to ``path`` what a fit and the test after it have taken.

    Args:
        path: a JSON file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._at: dict[str, float] = {}
        self._batches = 0

    def _mark(self, name: str) -> None:
        self._at[name] = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batches = int(trainer.num_training_batches)
        self._mark("trains")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._mark("trained")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark("validates")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark("validated")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark("tests")

    # Callbacks of a config come before those that write responses and measure what a model costs.

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark("responds")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark("responded")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "test":
            return
        self._mark("tested")
        responses = self._between("responds", "responded")
        parts = {
            "training": self._between("trains", "trained"),
            "validation": self._between("validates", "validated"),
            "test": self._between("tests", "tested") - responses,
            "responses": responses,
            "batches": self._batches,
        }
        write_object(self.path, parts)

    def _between(self, begin: str, end: str) -> float:
        return self._at[end] - self._at[begin] if begin in self._at and end in self._at else 0.0


def batches_of(steps: int, epoch: int, accumulated: int) -> int:
    """How many batches ``steps`` optimiser steps read; the last of an epoch may be of fewer.

    Args:
        steps: from the beginning of training.
        epoch: batches of an epoch.
        accumulated: batches of a step.
    """
    whole, rest = divmod(steps, math.ceil(epoch / accumulated))
    return whole * epoch + rest * accumulated


def measure_pace(base: Path, overlay: dict[str, Any], objective: str, accumulated: int, folder: Path) -> Pace:
    """Train, validate and test twice: to prepare data and fill the teacher's cache, and for the time.

    Args:
        base: the config.
        overlay: what lies over it in all runs.
        objective: a config, of the costliest.
        accumulated: batches of an optimiser step.
        folder: for the runs.

    Raises:
        UserError: a run failed, or its loss is no number.
    """
    shutil.rmtree(folder, ignore_errors=True)
    responses = overlay["responses"]
    first = {**overlay, "responses": {**responses, "enabled": False, "efficiency": False}}
    _, filled = _timed([base, config_path(objective)], first, 1, accumulated, folder / "filling")
    batches = int(filled["batches"])
    second = {**overlay, "responses": {**responses, "seeds": [10], "limit": TOGETHER}}
    interval = batches_of(_STEPS, batches, accumulated)
    whole, parts = _timed([base, config_path(objective)], second, _STEPS, interval, folder / "timed")
    measured = sum(parts[name] for name in ("training", "validation", "test", "responses"))
    return Pace(
        start=max(0.0, whole - measured),
        step=max(parts["training"] / _STEPS, 1e-3),
        validation=parts["validation"],
        test=parts["test"],
        responses=parts["responses"],
        batches=batches,
    )


def _timed(
    configs: list[Path], overlay: dict[str, Any], steps: int, interval: int, folder: Path
) -> tuple[float, dict[str, float]]:
    """Seconds of the whole process, and what its stopwatch has written."""
    path = folder / _FILE
    stopwatch = {"class_path": f"{__name__}.{Stopwatch.__name__}", "init_args": {"path": str(path)}}
    trainer = {
        "max_steps": steps, "max_epochs": -1, "num_sanity_val_steps": 0, "callbacks": [stopwatch],
        "check_val_every_n_epoch": None, "val_check_interval": interval,
    }  # fmt: skip
    own = folder / "overlay.yaml"
    write_atomic(own, yaml.safe_dump({**overlay, "trainer": trainer}))
    arguments = [*(f"--config={file}" for file in (*configs, own)), f"--output={folder}"]
    begun = time.monotonic()
    run_process("probe", arguments, folder, "", True, True)
    whole = time.monotonic() - begun
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if read_if_there(path, _REMEDY) is None:
        raise UserError(f"The first steps end in a loss that is no number; {folder / LOG} says more.")
    return whole, read_object(path, _REMEDY)
