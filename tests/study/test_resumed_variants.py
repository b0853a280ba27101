"""A variant whose process is killed goes on as `dskd fit` would have, and ends with the same weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from compared_runs import ComparedRun
from forked_runs import Kill, arm
from forks import become

from dskd_lightning.study import worker

STEPS = 8


def run_variant(
    run: ComparedRun,
    folder: Path,
    settings: str = "s",
    prepare: Callable[[], None] = lambda: None,
    options: tuple[str, ...] = (),
) -> int:
    """Train in a fork of this process; its exit status, negative for a signal."""
    arguments = [f"--config={run.config}", f"--output={folder}", *options]
    process = os.fork()
    if not process:

        def train() -> None:
            prepare()
            worker.run_variant(arguments, str(folder), settings, True, False)

        become(train, folder.parent / "out")
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.fixture
def run(tmp_path, model_folder) -> ComparedRun:
    changes: dict[str, Any] = {"trainer.max_epochs": -1, "trainer.max_steps": STEPS}
    return ComparedRun(tmp_path, model_folder, **changes, **{"trainer.val_check_interval": 0.5})


def killed(point: str, count: int) -> Callable[[], None]:
    return partial(arm, Kill(point, count))


def test_killed_variants_end_as_if_they_had_not_been(tmp_path, run) -> None:
    folder = tmp_path / "variant"
    assert run_variant(run, folder, prepare=killed("step", 6)) == -signal.SIGKILL
    assert worker.read_result(folder) is None
    assert run_variant(run, folder, prepare=killed("validation", 1)) == -signal.SIGKILL
    # Were it to begin anew, it would pass here.
    assert run_variant(run, folder, prepare=killed("step", 6)) == 0, (tmp_path / "out").read_text()
    run.check(folder)
    whole = tmp_path / "uninterrupted"
    assert run_variant(run, whole) == 0
    results = [worker.read_result(path) or {} for path in (folder, whole)]
    assert results[0]["validation"] == results[1]["validation"] != {}
    assert results[0]["training"]["steps"] == STEPS


def _killed_before_its_result() -> None:
    written = worker.write_object

    def write(path: Path, values: dict[str, Any]) -> None:
        if path.name == worker.DONE:
            os.killpg(0, signal.SIGKILL)
        written(path, values)

    worker.write_object = write


def test_a_variant_killed_after_its_last_step_keeps_its_last_validation(tmp_path, run) -> None:
    folder, whole = tmp_path / "variant", tmp_path / "uninterrupted"
    assert run_variant(run, folder, prepare=_killed_before_its_result) == -signal.SIGKILL
    assert run_variant(run, folder, prepare=killed("step", 1)) == 0, (tmp_path / "out").read_text()
    assert run_variant(run, whole) == 0
    results = [worker.read_result(path) or {} for path in (folder, whole)]
    assert results[0]["validation"] == results[1]["validation"] != {}
    run.check(folder)


def test_other_settings_begin_anew(tmp_path, run) -> None:
    folder = tmp_path / "variant"
    other = ("--model.optimizer.init_args.lr=0.02",)
    assert run_variant(run, folder, "other", killed("step", 6), other) == -signal.SIGKILL
    assert run_variant(run, folder) == 0, (tmp_path / "out").read_text()
    run.check(folder)
