"""A run that is killed anywhere, any number of times, ends as if it had never been."""

from __future__ import annotations

import csv
import random
from functools import partial
from pathlib import Path
from typing import Any

import pandas  # noqa: F401  (imported once, before forks)
import pytest
import torch
from forked_runs import Kill, count_calls, dskd_forked, killed
from tiny_runs import write_config

SFT = {"class_path": "dskd_lightning.objectives.SFTObjective"}
EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
EXPONENTIAL = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.9}}
RUNS: dict[str, dict[str, Any]] = {
    "default schedule": {},
    "LoRA, accumulation, packing, workers": {
        "model.student.lora": {"rank": 2, "dropout": 0.1},
        "trainer.accumulate_grad_batches": 2,
        "data.packing": True,
        "data.batch_size": 1,
        "data.num_workers": 1,
        "save_every_n_steps": 3,
    },
    "cached teacher, token budget, validations within epochs, schedule of one's own": {
        "model.objective": {"class_path": "dskd_lightning.objectives.DSKDObjective"},
        "data.teacher_cache": {},
        "data.max_tokens_per_batch": 300,
        "trainer.val_check_interval": 0.5,
        "model.lr_scheduler": EXPONENTIAL,
    },
    "max_steps": {"trainer.max_epochs": -1, "trainer.max_steps": 11, "save_every_n_steps": 2},
    "weight averaging": {"trainer.callbacks": [EMA]},
    "two ranks": {"trainer.devices": 2, "trainer.strategy": "ddp_fork", "data.batch_size": 3},
}
POINTS: dict[str, list[list[tuple[str, float]]]] = {
    "default schedule": [
        [("command", 0.5), ("step", 3), ("validation", 1), ("in save", 0.4), ("epoch end", 1), ("call", 0.1)],
        [("validation", 3), ("after save", 4)],
    ],
    "LoRA, accumulation, packing, workers": [
        [("step", 12), ("validation", 2), ("in save", 0.8), ("call", 0.2)],
    ],
    "cached teacher, token budget, validations within epochs, schedule of one's own": [
        [("command", 0.6), ("validation", 3), ("after save", 2), ("step", 3), ("before save", 2)],
    ],
    "max_steps": [[("epoch end", 1), ("step", 3), ("before save", 4)]],
    "weight averaging": [[("after save", 3), ("call", 0.3)]],
    "two ranks": [[("step", 3), ("validation", 2)]],
}
"""Chains of kills, each of the run that resumes after the one before; see `Kill`. A share counts calls."""
CLOCKS = {"monitor/tokens_per_second", "monitor/memory_gib"}


class _Run:
    """One configuration: the uninterrupted run, and copies that are killed."""

    def __init__(self, folder: Path, model_folder: Any, **changes: Any) -> None:
        self.folder = folder
        teacher = model_folder(hidden=24, seed=2) if "model.objective" in changes else None
        defaults = {
            "model.objective": SFT,
            "trainer.max_epochs": 3,
            "completions": {"prompts": 0},
            "data.batch_size": 5,
        }
        self.config = write_config(folder, model_folder(seed=1), teacher, **{**defaults, **changes})
        self.whole, self.calls = folder / "whole", {}
        paths = {point: folder / f"calls {point}" for point in ("call", "in save", "command")}

        def prepare() -> None:
            for point, path in paths.items():
                count_calls(point, path)

        self._fit(self.whole, partial(dskd_forked, prepare=prepare), expected=(0,))
        self.calls = {point: int(path.read_text()) for point, path in paths.items()}

    def _fit(self, run: Path, start: Any, expected: tuple[int, ...]) -> int:
        log = self.folder / f"{run.name}.log"
        start_over = not (run / "checkpoints" / "last.ckpt").exists()
        place = ("--overwrite", "true") if start_over else ("--ckpt_path", "last")
        status: int = start("fit", "--config", str(self.config), "--output", str(run), *place, log=log)
        assert status in expected, log.read_text(errors="replace")[-3000:]
        return status

    def survives(self, chain: list[tuple[str, float]], name: str) -> int:
        """Kill, resume, kill ... and compare; returns how many kills struck."""
        run, kills = self.folder / name, 0
        for point, count in chain:
            if point in self.calls:
                count = max(1, count * self.calls[point])
            kill = Kill(point, int(count))
            kills += self._fit(run, partial(killed, kill=kill), expected=(-9, 0)) != 0
        self._fit(run, dskd_forked, expected=(0,))
        for checkpoint in ("last", "best"):
            ours, theirs = (_contents(r / "checkpoints" / f"{checkpoint}.ckpt") for r in (run, self.whole))
            assert _differences(ours, theirs) == [], (checkpoint, chain)
        assert _rows(run) == _rows(self.whole), chain
        return kills


def _rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as stream:
        return [{k: v for k, v in row.items() if v and k not in CLOCKS} for row in csv.DictReader(stream)]


def _contents(path: Path) -> dict[str, Any]:
    """A checkpoint without what differs between runs: paths, clocks, counters of validation batches."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    scores = {"best_model_score", "kth_value", "latest_update_step"}
    callbacks = {
        name: {key: value for key, value in state.items() if key in scores}
        for name, state in checkpoint["callbacks"].items()
    }
    progress = checkpoint["loops"]["fit_loop"]
    progress = {key: value for key, value in progress.items() if "val_loop" not in key}
    return {**checkpoint, "callbacks": callbacks, "loops": progress}


def _differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    if isinstance(ours, torch.Tensor):
        return [] if isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs) else [place]
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return [f"{place}: {ours.keys() ^ theirs.keys()}"]
        return [d for key in ours for d in _differences(ours[key], theirs[key], f"{place}/{key}")]
    if isinstance(ours, list | tuple):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [d for i, (a, b) in pairs for d in _differences(a, b, f"{place}/{i}")]
    return [] if ours == theirs else [f"{place}: {ours} instead of {theirs}"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RUNS)
def test_killed_runs_end_as_if_they_had_not_been(tmp_path, model_folder, name) -> None:
    run = _Run(tmp_path, model_folder, **RUNS[name])
    for number, chain in enumerate(POINTS[name]):
        assert run.survives(chain, f"cut {number}") == len(chain)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_killed_everywhere(tmp_path, model_folder, name) -> None:
    """Some 34 kills of each kind of run, at random points."""
    run, draw, kills = _Run(tmp_path, model_folder, **RUNS[name]), random.Random(name), 0
    while kills < 34:
        points = {
            "step": draw.randint(1, 8),
            "validation": draw.randint(1, 3),
            "epoch end": draw.randint(1, 2),
            "before save": draw.randint(1, 6),
            "after save": draw.randint(1, 6),
            "in save": draw.random(),
            "call": draw.random(),
            "command": draw.random(),
        }
        chain = draw.sample(list(points.items()), draw.randint(1, 5))
        kills += run.survives(chain, f"cut {kills}")
