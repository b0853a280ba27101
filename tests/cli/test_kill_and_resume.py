"""A run that is killed anywhere, any number of times, ends as if it had never been."""

from __future__ import annotations

import random
from typing import Any

import pytest
from compared_runs import COUNTED, ComparedRun

EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
GROWING = {
    "class_path": "lightning.pytorch.callbacks.GradientAccumulationScheduler",
    "init_args": {"scheduling": {1: 2}},
}
SHARDED = {"class_path": "dskd_lightning.strategies.DSKDModelParallelStrategy"}
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
    "one epoch": {"trainer.max_epochs": 1},
    "max_steps": {"trainer.max_epochs": -1, "trainer.max_steps": 11, "save_every_n_steps": 2},
    "weight averaging, accumulation that grows": {"trainer.callbacks": [EMA, GROWING]},
    "an end that moves after a test": {
        "trainer.max_epochs": 2,
        "longer": ("--trainer.max_epochs", "3"),
    },
    "the student's own samples, 8-bit states": {
        "model.objective": {"class_path": "dskd_lightning.objectives.DSKDObjective"},
        "model.on_policy": {"fraction": 0.9, "buffer_steps": 3, "max_new_tokens": 24},
        "model.optimizer": {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 0.1}},
        "samples": {"prompts": 0},
    },
    "two ranks": {"trainer.devices": 2, "trainer.strategy": "ddp_fork", "data.batch_size": 3},
    "best by sampled responses, two ranks": {
        "best": {"monitor": "val/response_tokens", "mode": "min"},
        "validation": {"prompts": 3, "seeds": [1, 2], "max_new_tokens": 40},
        "model.optimizer.init_args": {"lr": 0.1},
        "trainer.devices": 2,
        "trainer.strategy": "ddp_fork",
        "data.batch_size": 3,
    },
    "sharded": {"trainer.devices": 2, "trainer.strategy": SHARDED, "data.batch_size": 3},
    "sharded, in folders": {
        "trainer.devices": 2,
        "trainer.strategy": {**SHARDED, "init_args": {"save_distributed_checkpoint": True}},
        "data.batch_size": 3,
    },
}
POINTS: dict[str, list[list[tuple[str, float]]]] = {
    "default schedule": [
        [("command", 0.5), ("step", 3), ("validation", 1), ("in save", 0.4), ("epoch end", 1), ("call", 0.1)],
        [("validation", 3), ("after save", 4)],
    ],
    "LoRA, accumulation, packing, workers": [
        [("step", 12), ("validation", 2), ("in save", 0.8), ("call", 0.2)],
        [("step", 8), ("step", 2)],
    ],
    "cached teacher, token budget, validations within epochs, schedule of one's own": [
        [("command", 0.6), ("validation", 3), ("after save", 2), ("step", 3), ("before save", 2)],
    ],
    "one epoch": [[("validation", 2)]],  # the first is the sanity check's
    "max_steps": [[("epoch end", 1), ("step", 3), ("before save", 4)]],
    "weight averaging, accumulation that grows": [[("after save", 3), ("step", 4), ("call", 0.3)]],
    "an end that moves after a test": [[("validation", 3), ("step", 2)]],
    "the student's own samples, 8-bit states": [[("step", 5), ("before save", 3)]],
    "two ranks": [[("step", 3), ("validation", 2)]],
    "best by sampled responses, two ranks": [[("step", 3), ("validation", 2), ("validation", 2)]],
    "sharded": [],
    "sharded, in folders": [[("step", 3), ("in save", 0.7)]],
}
"""Chains of kills, each of the run that resumes after the one before; see `Kill`. A share counts calls."""


def _needs(name: str) -> None:
    if "8-bit" in name:
        pytest.importorskip("bitsandbytes")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in RUNS if POINTS[name]])
def test_killed_runs_end_as_if_they_had_not_been(tmp_path, model_folder, name) -> None:
    _needs(name)
    counted = {point for chain in POINTS[name] for point, _ in chain}
    run = ComparedRun(tmp_path, model_folder, counted, **RUNS[name])
    for number, chain in enumerate(POINTS[name]):
        assert run.survives(chain, f"cut {number}") == len(chain)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_killed_everywhere(tmp_path, model_folder, name) -> None:
    """Some 24 kills of each kind of run, at random points: more than 250 in all."""
    _needs(name)
    run = ComparedRun(tmp_path, model_folder, COUNTED, **RUNS[name])
    draw, kills = random.Random(name), 0
    while kills < 24:
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
