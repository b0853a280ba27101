"""A process for each variant, so that peak memory is the variant's own and nothing leaks between them."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.process import BaseProcess
from pathlib import Path

from dskd_lightning.runs.lock import HeldLocks, locked
from dskd_lightning.study.failures import WorkerFailed
from dskd_lightning.study.log import LOG
from dskd_lightning.study.worker import run_variant

__all__ = ["run_process", "variant_lock"]


def run_process(
    name: str, arguments: Sequence[str], folder: Path, settings: str, train: bool, test: bool
) -> None:
    """`run_variant` in a fresh process.

    Raises:
        WorkerFailed: it did, or was told to stop.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=run_variant, args=(list(arguments), str(folder), settings, train, test, HeldLocks())
    )
    process.start()
    with _passed_on(process):
        process.join()
    if process.exitcode != 0:
        raise WorkerFailed(name, f"exit status {process.exitcode}, see {folder / LOG}")


def variant_lock(output: Path, name: str) -> AbstractContextManager[None]:
    """One study at a time runs a variant.

    Raises:
        UserError: another process does.
    """
    return locked(
        output / ".locks" / name,  # not in the variant's folder, which may be removed
        f"study: another process runs the variant {name!r} in {output}: wait until it has ended, choose "
        "others with --only, or another folder with --output.",
    )


@contextlib.contextmanager
def _passed_on(process: BaseProcess) -> Iterator[None]:
    """SIGTERM or SIGINT to the study ends its worker, too, which would train on alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        process.terminate()
        process.join()
        sys.exit(128 + number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
