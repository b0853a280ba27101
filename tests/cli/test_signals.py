"""A run that is told to stop saves, ends all ranks with a status that says so, and resumes exactly."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compared_runs import ComparedRun
from forked_runs import dskd_forked
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from dskd_lightning.callbacks import SignalStop, signals
from dskd_lightning.errors import UserError
from dskd_lightning.module import DistillationModule

TWO = {"trainer.devices": 2, "trainer.strategy": "ddp_fork", "data.batch_size": 3}


def tell(number: int, method: str, count: int, rank: int = 0, then: Callable[[], None] | None = None) -> None:
    """Send this process a signal at the n-th call of a method of the module, on one rank."""
    original, passed = getattr(DistillationModule, method), 0

    def wrapped(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal passed
        passed += 1
        if passed == count and self.global_rank == rank:
            os.kill(os.getpid(), number)
            if then is not None:
                then()
        return original(self, *args, **options)

    setattr(DistillationModule, method, wrapped)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> ComparedRun:
    changes = {"trainer.accumulate_grad_batches": 2, "save_every_n_steps": 50}
    return ComparedRun(tmp_path_factory.mktemp("signals"), model_folder, **changes)


def saved_step(run: Path) -> int:
    step: int = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    return step


@pytest.mark.parametrize(
    ("number", "method", "count", "step"),
    [
        (signal.SIGTERM, "training_step", 1, 1),  # in the first half of a step
        (signal.SIGINT, "training_step", 6, 3),
        (signal.SIGTERM, "validation_step", 2, 2),  # the first is the sanity check's
        (signal.SIGINT, "validation_step", 1, 0),
    ],
    ids=["SIGTERM", "SIGINT", "SIGTERM in validation", "SIGINT in the sanity check"],
)
def test_a_signal_saves_and_resumes(
    run: ComparedRun, number: int, method: str, count: int, step: int
) -> None:
    cut = run.folder / f"cut {number} {method}"
    run.fit(cut, prepare=partial(tell, number, method, count), expected=(128 + number,))
    log = (run.folder / f"{cut.name}.log").read_text()
    assert f"stopped by {signal.Signals(number).name} after step {step}" in log
    assert "Traceback" not in log
    assert saved_step(cut) == step
    run.fit(cut)
    run.check(cut)


def test_a_second_interrupt_ends_at_once(run: ComparedRun) -> None:
    cut = run.folder / "impatient"
    again = partial(os.kill, 0, signal.SIGINT)
    run.fit(cut, prepare=partial(tell, signal.SIGINT, "training_step", 3, then=again), expected=(1, 130))
    assert not (cut / "checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_told_stops_all(tmp_path: Path, model_folder: Any, rank: int) -> None:
    run = ComparedRun(tmp_path, model_folder, **TWO, save_every_n_steps=50)
    stop = partial(tell, signal.SIGTERM, "training_step", 2, rank)
    run.fit(tmp_path / "cut", prepare=stop, expected=(128 + signal.SIGTERM,))
    assert saved_step(tmp_path / "cut") == 2
    run.fit(tmp_path / "cut")
    run.check(tmp_path / "cut")


def test_slurm_requeues_and_the_same_command_resumes(run: ComparedRun, monkeypatch: Any) -> None:
    tools = run.folder / "tools"
    tools.mkdir()
    scontrol = tools / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> "{run.folder}/requeued"\n')
    scontrol.chmod(0o755)
    for name, value in {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "distil",
        "SLURM_JOB_ID": "4711",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    cut = run.folder / "slurm"
    arguments = ("fit", "--config", str(run.config), "--output", str(cut), "--overwrite", "true")
    log = run.folder / "slurm.log"
    stop = partial(tell, signal.SIGUSR1, "training_step", 3)
    assert dskd_forked(*arguments, log=log, prepare=stop) == 128 + signal.SIGUSR1, log.read_text()[-2000:]
    assert (run.folder / "requeued").read_text() == "requeue 4711\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert dskd_forked(*arguments, log=log) == 0, log.read_text()[-2000:]
    run.check(cut)


@pytest.mark.parametrize("array", [False, True])
def test_requeueing_goes_before_an_end_and_names_the_array(tmp_path, monkeypatch, caplog, array) -> None:
    """SLURM sends SIGTERM soon after, when the job is to be put back into the queue all the same."""
    stop, trainer = SignalStop(), SimpleNamespace(world_size=1)
    stop._told, stop._requeue = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}, signal.SIGUSR1
    assert stop._agree(trainer) == signal.SIGUSR1
    stop._requeue = None
    assert stop._agree(trainer) == signal.SIGTERM
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/said"\nexit 3\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "11")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    signals._requeue()
    job = "11_4" if array else "12"
    assert (tmp_path / "said").read_text() == f"requeue {job}\n"
    assert f"scontrol could not requeue job {job}: status 3" in caplog.text


def test_sigterm_ends_a_test_on_two_ranks(run: ComparedRun) -> None:
    arguments = ["test", "--config", str(run.config), "--output", str(run.whole)]
    arguments += [f"--{key}={value}" for key, value in TWO.items()]
    stop = partial(tell, signal.SIGTERM, "test_step", 1)
    status = dskd_forked(*arguments, log=run.folder / "test.log", prepare=stop, timeout=60)
    assert status == 128 + signal.SIGTERM


def test_ranks_that_the_first_has_started_end_with_it(monkeypatch: Any) -> None:
    """They would wait for it in a collective operation, or to join it, for minutes."""
    monkeypatch.setattr(SignalStop, "patience", 0.5)
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=3, num_nodes=1)
    waiting, ended = subprocess.Popen(["sleep", "300"]), subprocess.Popen(["true"])
    launcher.procs = observed = [waiting, ended]
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    module: Any = None
    SignalStop().on_exception(trainer, module, UserError("a mistake."))
    assert waiting.wait(timeout=5) == -signal.SIGKILL
    assert ended.wait(timeout=5) == 0
    assert not observed  # by whom this process would be killed
