"""Runs on files that come and go: killed anywhere they end as if they had not been and leave nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compared_runs import ComparedRun
from tiny_runs import dskd, write_config, write_data

RUNS: dict[str, tuple[dict[str, Any], list[tuple[str, float]]]] = {
    "one process": ({"data.num_workers": 1}, [("step", 4), ("before save", 9), ("validation", 2)]),
    "steps of three batches, the student's own samples": (
        {
            "trainer.accumulate_grad_batches": 3,
            "model.objective": {"class_path": "dskd_lightning.objectives.DSKDObjective"},
            "model.on_policy": {"fraction": 0.5, "buffer_steps": 2, "max_new_tokens": 8},
            "samples": {"prompts": 0},
        },
        [("step", 3), ("call", 0.5), ("before save", 3)],
    ),
    "two ranks": ({"trainer.devices": 2, "trainer.strategy": "ddp_fork"}, [("step", 5), ("after save", 4)]),
}


def files(folder: Path, count: int = 6) -> dict[str, Any]:
    """Settings for ``count`` files, of which a portion holds about two."""
    (folder / "files").mkdir()
    for number in range(count):
        write_data(folder / "files" / f"{number}.jsonl", 10 + number)
    return {
        "data.train": str(folder / "files"),
        "data.val": str(write_data(folder / "val.jsonl", 6)),
        "data.val_split": 0,
        "data.test_split": 0,
        "data.disk_limit_gb": 150_000 / 2**30,
        "data.num_proc": 1,
        "trainer.max_epochs": 3,
        "trainer.limit_train_batches": 11,
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RUNS)
def test_killed_runs_end_as_if_they_had_not_been(tmp_path, model_folder, name) -> None:
    changes, chain = RUNS[name]
    counted = {point for point, _ in chain}
    run = ComparedRun(tmp_path, model_folder, counted, **files(tmp_path), **changes)
    assert run.survives(chain, "cut") == len(chain)
    assert not list((tmp_path / "cache").glob("rolling-*"))


def test_an_epoch_must_have_a_length(tmp_path, model_folder) -> None:
    config = write_config(tmp_path, model_folder(), model_folder(seed=2), **files(tmp_path))
    said = dskd("fit", "--config", str(config), "--trainer.limit_train_batches", "1.0", check=False)
    assert said.returncode
    assert "say with trainer.limit_train_batches how many are an epoch" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_teacher_cache_is_refused_before_training(tmp_path, model_folder) -> None:
    config = write_config(tmp_path, model_folder(), model_folder(seed=2), **files(tmp_path))
    said = dskd("fit", "--config", str(config), "--data.teacher_cache", "{}", check=False)
    assert said.returncode
    assert "data.teacher_cache needs all training data on the disk together" in said.stderr
    said = dskd("cache", str(config), check=False)
    assert said.returncode
    assert "never on the disk together" in said.stderr
