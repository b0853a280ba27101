"""`dskd` in forked processes, which have everything imported already, killed at chosen points."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from forks import become
from lightning.pytorch.loops.fit_loop import _FitLoop
from ports import free_port

from dskd_lightning.callbacks import LastCheckpoint
from dskd_lightning.cli.main import main
from dskd_lightning.launch.lightning_cli import DistillationCLI
from dskd_lightning.module import DistillationModule


@dataclass(frozen=True)
class Kill:
    """SIGKILL to the run's whole process group.

    Args:
        point: ``step``, ``validation``, ``epoch end``, ``before save`` or ``after save``, which count how
            often they are passed; ``in save``, ``call`` or ``command``, which count calls of functions
            in the second save, in training or in all of the command.
        count: when to kill.
    """

    point: str
    count: int


def _methods(point: str) -> tuple[type, str]:
    return {
        "step": (DistillationModule, "training_step"),
        "validation": (DistillationModule, "validation_step"),
        "epoch end": (LastCheckpoint, "on_train_epoch_end"),
        "before save": (L.Trainer, "save_checkpoint"),
        "after save": (L.Trainer, "save_checkpoint"),
        "in save": (L.Trainer, "save_checkpoint"),
        "call": (_FitLoop, "run"),
        "command": (DistillationCLI, "__init__"),
    }[point]


def _is_counted(point: str, passed: int) -> bool:
    return point in ("call", "command") or (point == "in save" and passed == 2)


def arm(kill: Kill) -> None:
    """From now on kill at its point."""
    owner, name = _methods(kill.point)
    original, passed = getattr(owner, name), 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal passed
        passed += 1
        if _is_counted(kill.point, passed):
            with _counted_calls(kill.count):
                return original(*args, **options)
        here = passed == kill.count and kill.point != "in save"
        if here and kill.point != "after save":
            os.killpg(0, signal.SIGKILL)
        result = original(*args, **options)
        if here:
            os.killpg(0, signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


@contextlib.contextmanager
def _counted_calls(kill_at: int | None = None) -> Iterator[list[int]]:
    """Count the calls of functions, be they Python's or C's."""
    calls, outer = [0], sys.getprofile()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if outer is not None:
            outer(frame, event, argument)
        if event in ("call", "c_call"):
            calls[0] += 1
            if calls[0] == kill_at:
                os.killpg(0, signal.SIGKILL)

    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(outer)


def count_calls(point: str, path: Path) -> None:
    """From now on write to ``path`` how many calls a `Kill` at the point counts."""
    owner, name = _methods(point)
    original, passed = getattr(owner, name), 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal passed
        passed += 1
        if not _is_counted(point, passed):
            return original(*args, **options)
        with _counted_calls() as calls:
            result = original(*args, **options)
        path.write_text(str(calls[0]))
        return result

    setattr(owner, name, wrapped)


def as_two_ranks() -> None:
    """Go on as two processes of one run, as a launcher outside of Lightning starts them.

    The port is that of `dskd_forked`.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", WORLD_SIZE="2", NODE_RANK="0")
    os.environ["LOCAL_RANK"] = "0" if os.fork() else "1"


def dskd_forked(
    *arguments: str,
    log: Path,
    prepare: Callable[[], None] = lambda: None,
    meanwhile: Callable[[int], None] = lambda _: None,
    timeout: float = 120,
) -> int:
    """Run ``dskd`` in a fork of this process, in a process group of its own.

    Args:
        arguments: the command line.
        log: file to which it writes what it would print.
        prepare: called in the fork first.
        meanwhile: called in this process with the fork's id.
        timeout: seconds until all of its group is killed and the test fails.

    Returns:
        The exit status, negative for a signal.
    """
    port = free_port()  # here, so that two forks get two
    process = os.fork()
    if not process:

        def run() -> int:
            os.environ["MASTER_PORT"] = str(port)
            prepare()
            return main(arguments)

        become(run, log)
    meanwhile(process)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError(f"{arguments} hangs: {log.read_text(errors='replace')[-2000:]}")
