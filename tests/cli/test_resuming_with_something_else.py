"""Resuming with other settings is one sentence, and its advice works."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked_runs import dskd_forked
from tiny_runs import write_config

OBJECTIVES = "dskd_lightning.objectives."


class _Trained:
    """A run stopped after two steps, and what becomes of going on with other settings."""

    def __init__(self, folder: Path, model_folder: Any, **changes: Any) -> None:
        self.folder = folder
        config = write_config(
            folder,
            model_folder(seed=1),
            model_folder(hidden=24, seed=2),
            **{"trainer.max_steps": 2, "completions": {"prompts": 0}, "data.val_split": 0, **changes},
        )
        self.arguments = ("fit", "--config", str(config))
        assert dskd_forked(*self.arguments, "--output", str(folder / "first"), log=folder / "log") == 0

    def go_on(self, *options: str, again: bool = False) -> tuple[int, str, dict[str, Any]]:
        """Status, messages and last checkpoint of resuming, or of starting another run from the weights."""
        run, log = self.folder / "next", self.folder / "log"
        shutil.rmtree(run, ignore_errors=True)
        log.unlink()
        place = ["--ckpt_path", "last"]
        if again:
            place = ["--model.weights_from", str(self.folder / "first")]
        else:
            shutil.copytree(self.folder / "first", run)
        arguments = (*self.arguments, "--output", str(run), *place, "--trainer.max_steps", "3", *options)
        status = dskd_forked(*arguments, log=log)
        path = run / "checkpoints/last.ckpt"
        return status, log.read_text(), torch.load(path, weights_only=True) if path.exists() else {}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> _Trained:
    return _Trained(tmp_path_factory.mktemp("full"), model_folder)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> _Trained:
    return _Trained(tmp_path_factory.mktemp("lora"), model_folder, **{"model.student.lora": {"rank": 2}})


OTHERS = {
    "optimizer": ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"],
    "lr_scheduler": ["--model.lr_scheduler=ExponentialLR", "--model.lr_scheduler.gamma=0.9"],
    "set of trained parts": ["--model.student.freeze_embeddings=true"],
    "objective or projector": [f"--model.objective={OBJECTIVES}SFTObjective"],
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_settings_are_refused_and_the_weights_can_start_anew(full: _Trained, what: str) -> None:
    status, log, _ = full.go_on(*OTHERS[what])
    assert status == 2, log[-2000:]
    assert f"trained with another {what}" in log
    assert f"--model.weights_from {full.folder / 'next'}" in log
    assert "Traceback" not in log
    if what == "optimizer":
        still = ["--model.optimizer.lr=0", "--model.projector_lr=0"]
        status, log, checkpoint = full.go_on(*OTHERS[what], *still, again=True)
        assert status == 0, log[-2000:]
        assert checkpoint["global_step"] == 3
        old = torch.load(full.folder / "first/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert old.keys() == checkpoint["state_dict"].keys()
        assert any(name.startswith("objectives.") for name in old)
        assert all(torch.equal(old[name], value) for name, value in checkpoint["state_dict"].items())


def test_another_teacher_or_student_of_the_same_shape_is_seen(full: _Trained, model_folder: Any) -> None:
    status, log, _ = full.go_on("--model.teacher.source", model_folder(hidden=24, seed=3))
    assert status == 2
    assert "trained with another teacher" in log
    status, log, _ = full.go_on("--model.student.source", model_folder(seed=4))
    assert status == 2
    assert "trained with another student" in log


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("hidden", [16, 48])
def test_a_teacher_of_another_width_is_one_sentence_before_training(
    full: _Trained, model_folder: Any, hidden: int, cached: bool
) -> None:
    options = ["--data.teacher_cache.dtype=float32"] if cached else []
    status, log, checkpoint = full.go_on(
        "--model.teacher.source", model_folder(hidden=hidden, seed=3), *options
    )
    assert status == 2, log[-2000:]
    assert log.splitlines()[-1].startswith("dskd: error: ")
    assert "was trained with another teacher: resume with that" in log.splitlines()[-1]
    assert f"--model.weights_from {full.folder / 'next'}" in log.splitlines()[-1]
    assert "Traceback" not in log
    assert checkpoint["global_step"] == 2


def test_other_shapes_are_one_sentence(full: _Trained, lora: _Trained, model_folder: Any) -> None:
    for run, options in (
        (lora, ["--model.student.lora.rank=4"]),
        (lora, ["--model.student.lora=null"]),
        (full, ["--model.student.source", model_folder(hidden=32, seed=5)]),
        (full, ["--data.batch_size=2"]),
    ):
        status, log, _ = run.go_on(*options)
        assert status == 2, log[-2000:]
        assert "Traceback" not in log
    status, log, _ = lora.go_on("--model.student.lora.rank=4", again=True)
    assert status == 2
    assert "dskd export" in log.splitlines()[-1]


def test_an_adapter_starts_anew_with_other_batches(lora: _Trained) -> None:
    still = ["--model.optimizer.lr=0", "--model.projector_lr=0", "--data.batch_size=2"]
    status, log, checkpoint = lora.go_on(*still, again=True)
    assert status == 0, log[-2000:]
    old = torch.load(lora.folder / "first/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(old[name], value) for name, value in checkpoint["state_dict"].items())


def test_another_learning_rate_is_said(full: _Trained) -> None:
    status, log, _ = full.go_on("--model.optimizer.lr=0.5")
    assert status == 0
    assert "resuming with the checkpoint's learning rates [0.01" in log


def test_no_weights_to_start_from_is_one_sentence(full: _Trained) -> None:
    (full.folder / "junk.ckpt").write_bytes(b"junk")
    for place, sentence in (
        ("nowhere", "neither a checkpoint"),
        (full.folder / "junk.ckpt", "can't be used"),
    ):
        status, log, _ = full.go_on("--model.weights_from", str(place), again=True)
        assert status == 2
        assert sentence in log
        assert "Traceback" not in log


def test_a_checkpoint_named_by_its_file_changes_no_option(full: _Trained) -> None:
    whole = full.folder / "first" / "checkpoints" / "last.ckpt"
    status, log, _ = full.go_on("--ckpt_path", str(whole), "--model.warmup_ratio=0.25")
    assert status == 0, log[-2000:]
    written = yaml.safe_load((full.folder / "next" / "config.yaml").read_text())
    assert written["model"]["warmup_ratio"] == 0.25


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_checkpoint_named_by_its_file_is_one_sentence(full: _Trained, damage: str) -> None:
    whole = (full.folder / "first" / "checkpoints" / "last.ckpt").read_bytes()
    file = full.folder / "damaged.ckpt"
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    file.write_bytes({"cut": whole[:half], "flipped": flipped, "empty": b"", "other": b"{}"}[damage])
    status, log, _ = full.go_on("--ckpt_path", str(file))
    assert status == 2, log[-2000:]
    assert "damaged.ckpt" in log.splitlines()[-1]
    assert "Traceback" not in log
