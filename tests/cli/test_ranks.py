"""Two ranks give what one gives, and end together whatever happens to one of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import dskd_ranks
from forked_runs import dskd_forked
from tiny_runs import write_config

from dskd_lightning.module import DistillationModule
from dskd_lightning.runs.metrics_file import read_rows

TWO = {"trainer.devices": 2, "trainer.strategy": "ddp", "completions": {"prompts": 0}}
ONE = ("--trainer.devices=1", "--trainer.strategy=auto")


def at_call(method: str, count: int, then: Callable[[Any], Any], rank: int = 1) -> Callable[[int], None]:
    """A ``prepare`` that lets ``then`` change what the n-th call returns, on one rank."""

    def prepare(own: int) -> None:
        original, passed = getattr(DistillationModule, method), 0

        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            nonlocal passed
            passed += 1
            result = original(self, *args, **options)
            return then(result) if passed == count and own == rank else result

        setattr(DistillationModule, method, wrapped)

    return prepare


def results(run: Path) -> dict[str, Any]:
    """What `test` wrote: metrics, and the analysis of the models' hidden states."""
    found = {name: json.loads((run / f"{name}.json").read_text()) for name in ("metrics", "representation")}
    for name in ("metrics.json", "representation.json"):
        (run / name).unlink()
    shutil.rmtree(run / "predictions")
    return found


def test_two_ranks_test_what_one_tests(tmp_path: Path, model_folder: Any) -> None:
    changes = {"responses.max_new_tokens": 40, "trainer.max_epochs": 1, "data.test_split": 5}
    config = write_config(
        tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **{**TWO, **changes}
    )
    dskd_ranks("fit", "--config", str(config), folder=tmp_path)
    dskd_ranks("test", "--config", str(config), folder=tmp_path)
    two = results(tmp_path / "run")
    assert dskd_forked("test", "--config", str(config), *ONE, log=tmp_path / "one.log") == 0
    one = results(tmp_path / "run")
    assert one["metrics"]["distinct_2"] > 0
    assert two["metrics"].pop("model") == one["metrics"].pop("model")
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
    assert two["representation"]["after"] == pytest.approx(one["representation"]["after"], rel=1e-5)
    assert two["representation"]["projectors"].keys() == one["representation"]["projectors"].keys()


def test_two_ranks_validate_responses_as_one_does(tmp_path: Path, model_folder: Any) -> None:
    changes = {
        "validation": {"prompts": 3, "seeds": [1, 2], "max_new_tokens": 40},
        "best": {"monitor": "val/response_tokens", "mode": "max"},
        "model.optimizer.init_args": {"lr": 0.1},
        "trainer.max_epochs": 3,
    }
    config = write_config(
        tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **{**TWO, **changes}
    )
    dskd_ranks("fit", "--config", str(config), folder=tmp_path)
    dskd_ranks("validate", "--config", str(config), folder=tmp_path)
    assert dskd_forked("validate", "--config", str(config), *ONE, log=tmp_path / "one.log") == 0
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    validated = [row for row in rows if row.get("val/response_tokens")]
    measured = [{name: float(row[name]) for name in row if "val/" in name} for row in validated]
    *fit, two, one = ({k: v for k, v in row.items() if "val/teacher_" not in k} for row in measured)
    assert one == pytest.approx(two, rel=1e-5)
    lengths = [row["val/response_tokens"] for row in fit]
    assert len(set(lengths)) > 1
    best = lengths.index(max(lengths))
    assert two == pytest.approx(fit[best], rel=1e-5)  # the best of them all, whoever measures it
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == int(validated[best]["step"]) + 1


def test_a_rank_without_a_batch_holds_nobody_up(tmp_path: Path, model_folder: Any) -> None:
    transport = {
        "class_path": "dskd_lightning.alignment.ConditionalTransport",
        "init_args": {"width": 8, "outputs": 4, "segments": 3},
    }
    objective = {
        "class_path": "dskd_lightning.objectives.DSKDCrossAttentionObjective",
        "init_args": {"matching": transport},
    }
    changes = {"model.objective": objective, "data.val_split": 3, "data.batch_size": 6}  # 17 examples
    teacher = model_folder(tokenizer="unigram", hidden=24, seed=2)
    config = write_config(tmp_path, model_folder(seed=1), teacher, **{**TWO, **changes})
    dskd_ranks("fit", "--config", str(config), folder=tmp_path, timeout=60)


def test_a_loss_of_one_rank_that_is_no_number_ends_all_with_one_sentence(
    tmp_path: Path, model_folder: Any
) -> None:
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **TWO)
    spoil = at_call("distil", 2, lambda output: replace(output, loss=output.loss * torch.nan))
    ended = dskd_ranks("fit", "--config", str(config), folder=tmp_path, prepare=spoil, expected=2)
    sentences = {line for log in ended.logs for line in log.splitlines() if "The loss is" in line}
    assert len(sentences) == 1
    assert "nan at epoch 0, batch 1" in sentences.pop()
    assert not any("Traceback" in log for log in ended.logs)


def test_a_killed_rank_ends_the_others_within_a_minute(tmp_path: Path, model_folder: Any) -> None:
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **TWO)
    kill = at_call("distil", 2, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    ended = dskd_ranks(
        "fit", "--config", str(config), folder=tmp_path, prepare=kill, expected=None, timeout=60
    )
    assert ended.statuses[1] == -signal.SIGKILL
    assert ended.statuses[0] not in (0, None)


def test_two_ranks_warm_projectors_up_as_one_does(tmp_path: Path, model_folder: Any) -> None:
    changes = {"model.projector_warmup_steps": 2, "trainer.max_epochs": 1, "trainer.log_every_n_steps": 1}
    config = write_config(
        tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **{**TWO, **changes}
    )
    two, one = f"--output={tmp_path / 'two'}", f"--output={tmp_path / 'one'}"
    dskd_ranks("fit", "--config", str(config), "--data.batch_size=2", two, folder=tmp_path)
    assert dskd_forked("fit", "--config", str(config), *ONE, one, log=tmp_path / "one.log") == 0
    losses = []
    for name in ("one", "two"):
        rows = read_rows(tmp_path / name / "metrics.csv")
        uneven = [float(row["train/slowest_rank"]) for row in rows if row.get("train/slowest_rank")]
        assert len(uneven) == (name == "two") * len([row for row in rows if row.get("train/loss")])
        assert all(
            0 <= share < 1 for share in uneven
        )  # of two ranks the fullest has less than twice the mean
        losses.append([float(row["train/loss"]) for row in rows if row.get("train/loss")])
    assert len(losses[0]) > 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
