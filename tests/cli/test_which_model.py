"""What `test`, `predict` and `compare` score is what they say, and a run folder holds one run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked_runs import Kill, arm, dskd_forked
from tiny_runs import write_config

from dskd_lightning.callbacks import BestCheckpoint
from dskd_lightning.checkpoints import digest_of, write_file
from dskd_lightning.module import DistillationModule
from dskd_lightning.runs.lock import lock_run
from dskd_lightning.runs.run_folder import RunFolder

SFT = {"class_path": "dskd_lightning.objectives.SFTObjective"}


class Runs:
    """Commands on one run folder."""

    def __init__(self, folder: Path, model_folder: Any, **changes: Any) -> None:
        options = {"completions": {"prompts": 0}, "trainer.max_epochs": 1, "responses.efficiency": False}
        changes = {"model.objective": SFT, **options, **changes}
        self.config, self.run, self.log = folder / "config.yaml", folder / "run", folder / "log"
        write_config(folder, model_folder(seed=1), None, **changes)

    def __call__(
        self,
        command: str,
        *arguments: str,
        expected: int = 0,
        config: Path | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> str:
        self.log.unlink(missing_ok=True)
        line = (command, "--config", str(config or self.config), "--output", str(self.run), *arguments)
        status = dskd_forked(*line, log=self.log, prepare=prepare)
        text = self.log.read_text(errors="replace")
        assert status == expected, (status, text[-3000:])
        return " ".join(text.split())

    def result(self, name: str = "metrics") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / f"{name}.json").read_text())
        return found


def test_a_run_without_validation_is_tested_at_its_last_checkpoint(tmp_path, model_folder) -> None:
    runs = Runs(tmp_path, model_folder, **{"data.val_split": 0})
    assert "--untrained true" in runs("test", expected=2)
    assert not (runs.run / "metrics.json").exists()
    runs("test", "--untrained", "true")
    untrained = runs.result()
    assert untrained["model"]["checkpoint"] is None
    assert untrained["model"]["step"] == 0

    note = runs.run / ".metrics.csv.crc32"
    for file in (note, runs.run / "mine.txt"):
        file.touch()
    checkpoints = runs.run / "checkpoints"
    checkpoints.mkdir()
    for name in ("best", "last"):
        (checkpoints / f"{name}.ckpt").write_bytes(b"another run's")
    start_over = ("fit", "--config", str(runs.config), "--output", str(runs.run), "--overwrite", "true")
    killed = partial(arm, Kill("step", 1))
    assert dskd_forked(*start_over, log=runs.log, prepare=killed) == -signal.SIGKILL
    assert not note.exists()
    assert "last.ckpt does not exist" in runs("fit", "--ckpt_path", "last", expected=2)
    runs("fit", "--overwrite", "true")
    assert [path.name for path in checkpoints.iterdir()] == ["last.ckpt"]
    assert not (runs.run / "predictions").exists()
    assert not (runs.run / "metrics.json").exists()
    assert (runs.run / "mine.txt").exists()

    last = runs.run / "checkpoints" / "last.ckpt"
    assert "last.ckpt, since no validation has chosen a best one" in runs("test")
    model = runs.result()["model"]
    assert (model["checkpoint"], model["digest"]) == ("last.ckpt", digest_of(last))
    assert model["step"] == torch.load(last, weights_only=True)["global_step"] > 0
    assert runs.result()["nll_per_token"] != untrained["nll_per_token"]
    assert "give one of them" in runs("test", "--untrained", "true", "--ckpt_path", "last", expected=2)


def test_results_name_the_checkpoint_that_was_read_if_it_is_replaced(tmp_path, model_folder) -> None:
    runs = Runs(tmp_path, model_folder, **{"data.val_split": 0})
    runs("fit")
    last = runs.run / "checkpoints" / "last.ckpt"
    read = digest_of(last)

    def replace(*_: Any) -> None:
        content = torch.load(last, weights_only=True)
        write_file({**content, "global_step": 1000}, last)

    def replace_at_the_end() -> None:
        DistillationModule.on_test_epoch_end = replace  # type: ignore[method-assign]

    runs("test", prepare=replace_at_the_end)
    assert digest_of(last) != read
    assert runs.result()["model"]["digest"] == read
    assert runs.result()["model"]["step"] != 1000


def test_a_resumed_run_is_tested_at_its_best_and_prediction_keeps_that(tmp_path, model_folder) -> None:
    runs = Runs(tmp_path, model_folder)
    runs("fit")
    runs("fit", "--ckpt_path", "last", "--trainer.max_epochs", "2")
    saved = yaml.safe_load((runs.run / "config.yaml").read_text())
    assert saved["ckpt_path"] is None
    assert saved["overwrite"] is False
    assert saved["trainer"]["max_epochs"] == 2

    runs("test", config=runs.run / "config.yaml")
    before = (runs.run / "metrics.json").read_bytes()
    model, best = runs.result()["model"], runs.run / "checkpoints" / "best.ckpt"
    assert (model["checkpoint"], model["digest"]) == ("best.ckpt", digest_of(best))
    assert model["config"]
    assert RunFolder.read(runs.run).mixtures() == []

    for file in (runs.run / "predictions").iterdir():
        file.unlink()
    runs("predict", "--data.predict", str(tmp_path / "data.jsonl"), "--responses.limit", "2")
    assert (runs.run / "metrics.json").read_bytes() == before
    assert runs.result("predict")["model"] == model


def test_results_of_two_checkpoints_are_told_apart(tmp_path) -> None:
    def write(name: str, **model: Any) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps({"model": model}))

    write("metrics", checkpoint="best.ckpt", digest="a", step=3, weights="w")
    write("efficiency", checkpoint="best.ckpt", digest="a", step=3)
    folder = RunFolder.read(tmp_path)
    assert folder.mixtures() == []
    write("efficiency", checkpoint="last.ckpt", digest="b", step=4)
    both = "efficiency.json is of last.ckpt at step 4 (b), metrics.json of best.ckpt at step 3 (a)"
    assert folder.mixtures() == [f"{tmp_path}: {both}: test again"]
    (tmp_path / "efficiency.json").unlink()
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "settings.json").write_text('{"model": "v"}')
    other = "predictions are of another model than metrics.json"
    assert folder.mixtures() == [f"{tmp_path}: {other}: test again"]


def test_a_second_process_in_a_run_folder_is_refused_until_the_first_is_dead(tmp_path, model_folder) -> None:
    runs = Runs(tmp_path, model_folder)
    reader, writer = os.pipe()
    if not (process := os.fork()):
        lock_run(runs.run)
        os.write(writer, b"x")
        signal.pause()
    os.close(writer)  # so that reading ends, should the other do
    os.read(reader, 1)
    try:
        assert "another process works in" in runs("fit", expected=2)
        for command in ("validate", "test"):
            assert "another process works in" in runs(command, "--untrained", "true", expected=2)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    runs("fit")


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_knows_its_best_again_where_its_folder_was_moved(tmp_path, moved) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "best.ckpt").touch()
    first = BestCheckpoint(old)
    path = str(old / "best.ckpt")
    first.best_model_path = first.kth_best_model_path = path
    first.best_model_score = first.best_k_models[path] = first.kth_value = torch.tensor(2.0)
    state = first.state_dict()
    if moved:
        old.rename(new)
    folder = new if moved else old
    second = BestCheckpoint(folder)
    second.load_state_dict(state)
    assert second.best_model_score == second.kth_value == 2.0
    assert second.best_k_models == {str(folder / "best.ckpt"): 2.0}
    assert second.best_model_path == second.kth_best_model_path == str(folder / "best.ckpt")


def test_an_exported_student_is_evaluated_as_it_is_where_there_is_no_run(tmp_path, model_folder) -> None:
    runs = Runs(tmp_path, model_folder)
    runs("fit")
    runs("test", "--ckpt_path", "last")
    score, digest = runs.result()["nll_per_token"], runs.result()["model"]["digest"]
    folder = tmp_path / "student"
    assert dskd_forked("export", str(runs.run), str(folder), "--ckpt_path", "last", log=runs.log) == 0
    named = json.loads((folder / "distillation.json").read_text())
    assert (named["digest"], named["run"]) == (digest, runs.run.name)  # the folder may be uploaded
    assert named["step"] > 0
    best = runs.run / "checkpoints" / "best.ckpt"
    best.write_bytes(best.read_bytes()[:-1000])
    named = f"give the one beside it, --ckpt_path {best.with_name('last.ckpt')}"
    assert named in runs("test", expected=2)
    assert dskd_forked("export", str(runs.run), str(tmp_path / "none"), log=runs.log) == 2
    assert named in " ".join(runs.log.read_text().split())
    assert "Traceback" not in runs.log.read_text()
    runs.run = tmp_path / "elsewhere"
    student = ["--model.student.source", str(folder)]
    assert f"evaluating the exported student '{folder}' itself" in runs("test", *student)
    assert runs.result()["nll_per_token"] == pytest.approx(score, rel=1e-6)
    (runs.run / "config.yaml").write_text("seed_everything: 1")  # a run that hasn't saved anything yet
    assert "--untrained true" in runs("test", *student, expected=2)


def test_a_model_checkpoint_of_the_user_s_own_takes_the_place_of_ours(tmp_path, model_folder) -> None:
    own = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": str(tmp_path / "own"), "filename": "chosen", "monitor": "val/accuracy", "mode": "max",
        },
    }  # fmt: skip
    runs = Runs(tmp_path, model_folder, **{"trainer.callbacks": [own]})
    refused = runs("fit", "--best.monitor", "val/accuracy", expected=2)
    assert "best.monitor: val/accuracy would choose nothing" in refused
    assert "a ModelCheckpoint of your own is among trainer.callbacks" in refused
    runs("fit")
    assert not (runs.run / "checkpoints").exists()
    assert "--untrained true" in runs("test", expected=2)
    runs("test", "--ckpt_path", str(tmp_path / "own" / "chosen.ckpt"))
    assert runs.result()["model"]["checkpoint"] == "chosen.ckpt"
