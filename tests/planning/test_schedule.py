"""A benchmark's budget is for everything: what isn't training is measured and taken away first."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import become
from tiny_runs import write_config

from dskd_lightning.errors import UserError
from dskd_lightning.planning.pace import Pace, batches_of, measure_pace
from dskd_lightning.planning.schedule import Work, schedule
from dskd_lightning.study.worker import run_variant

WORK = Work(objectives=4, rates=2, prompts=70, seeds=3, teacher=5.0, accumulated=4)
PACE = Pace(start=10.0, step=2.0, validation=20.0, test=7.0, responses=3.0, batches=1000)


def test_everything_is_in_the_budget() -> None:
    processes = 8 + 4 + 2  # a grid's best is tested in a process of its own
    tests = (4 + 1 + 5) * (7 + 3 * 3 * 3)  # the student before training and the teacher, too
    rest = 10 * processes + 8 * 3 * 20 + tests + 15
    assert WORK.seconds(PACE) == rest
    found = schedule(WORK, PACE, 3600, 100)
    assert found.steps == (3600 - 100 - rest) // (8 * 2) // 3 * 3
    assert found.seconds == rest + 8 * 2 * found.steps
    assert 3 * found.interval == batches_of(found.steps, 1000, 4)
    one = replace(WORK, rates=1)
    assert one.seconds(PACE) == rest - 10 * 8 - 4 * 3 * 20


def test_three_epochs_are_enough() -> None:
    pace = replace(PACE, batches=10)
    found = schedule(WORK, pace, 36000, 0)
    assert (found.steps, found.epochs, found.interval) == (
        9,
        3.0,
        10,
    )  # the third step of each of two batches
    assert found.seconds < 36000


@pytest.mark.parametrize(("steps", "batches"), [(1, 4), (2, 8), (3, 10), (4, 14), (6, 20)])
def test_the_last_step_of_an_epoch_may_be_of_fewer_batches(steps, batches) -> None:
    assert batches_of(steps, 10, 4) == batches


def test_too_little_is_refused_with_what_would_do() -> None:
    with pytest.raises(
        UserError, match=r"--budget 10 min 0 s: 1 min 40 s have gone by.* at least (\d+) min"
    ) as told:
        schedule(WORK, PACE, 600, 100)
    least = float(str(told.value).partition("at least ")[2].split()[0]) * 60
    assert schedule(WORK, PACE, least, 100).steps >= 1


@pytest.fixture
def forked(monkeypatch, tmp_path) -> None:
    """Processes are forks of this one."""

    def run(name: str, arguments: list[str], folder: Path, *options: Any) -> None:
        if not (process := os.fork()):
            become(partial(run_variant, arguments, str(folder), *options), tmp_path / "out")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, (tmp_path / "out").read_text()

    monkeypatch.setattr("dskd_lightning.planning.pace.run_process", run)


def test_the_parts_of_a_run_are_measured(model_folder, tmp_path, forked) -> None:
    models = model_folder(seed=1), model_folder(hidden=24, seed=2)
    changes = {"trainer.accumulate_grad_batches": 3, "data.teacher_cache": {}}
    config = write_config(tmp_path, *models, **changes)
    values = yaml.safe_load(config.read_text())
    overlay = {"data": values.pop("data"), "responses": values["responses"], "completions": {"prompts": 0}}
    del values["trainer"]["max_epochs"]
    config.write_text(yaml.safe_dump(values))
    pace = measure_pace(config, overlay, "dskd:objective/dskd", 3, tmp_path / "probe")
    assert pace.batches == 4
    for name in ("start", "step", "validation", "test", "responses"):
        assert 0 < getattr(pace, name) < 30, name
    assert not list((tmp_path / "probe").rglob("*.ckpt"))


def test_a_probe_that_diverges_says_so(model_folder, tmp_path, forked) -> None:
    changes = {"model.optimizer.init_args.lr": 1e30, "model.warmup_ratio": 0.0}
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **changes)
    overlay = {"responses": {"seeds": [], "max_new_tokens": 4}}
    with pytest.raises(UserError, match=r"no number; .*variant\.log"):
        measure_pace(config, overlay, "dskd:objective/sft", 1, tmp_path / "probe")
