"""Work on chunks in several processes, with the results in the order of the chunks."""

from __future__ import annotations

import collections
import contextlib
import errno
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from dskd_lightning.errors import UserError
from dskd_lightning.runs.parent import end_with_parent

__all__ = ["WorkerEnded", "worked_in_order"]

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_AHEAD = 2
"""Chunks for each process that wait or are in work, so that memory doesn't grow with the data."""
_FIRST_TO_END = "1000"
"""The kernel ends such a process before others; without it the largest, which is the one that could tell."""
_LOOK = 1.0
"""Seconds after which a result that doesn't come is asked whether anybody is still at it."""

_work: Callable[[Any], Any]


class WorkerEnded(UserError):
    """A process that worked was ended from outside, or none more could be; nothing is wrong with the data."""


def worked_in_order(work: Callable[[_In], _Out], chunks: Iterable[_In], processes: int) -> Iterator[_Out]:
    """``work`` of every chunk, in their order, in this process or in ``processes`` others.

    An error ends it as in one process: the first chunk that fails is the one that is told, also where
    the source of the chunks has failed further on.

    Args:
        work: can be pickled, as can chunks and results.
        chunks: read here, only as far ahead as keeps the others busy.
        processes: 1 for none but this.

    Raises:
        WorkerEnded: the operating system has ended one of the processes, or refuses what they need.
    """
    if processes < 2 or _may_not_fork():
        yield from map(work, chunks)
        return
    failures: list[Exception] = []
    more = _until_failure(chunks, failures)
    first = list(islice(more, 2))
    if len(first) < 2:  # which isn't worth starting processes
        yield from map(work, first)
    else:
        yield from _shared_out(work, chain(first, more), processes)
    for failure in failures:
        raise failure


def _until_failure(chunks: Iterable[_In], failures: list[Exception]) -> Iterator[_In]:
    """``chunks`` up to where reading them fails, which is told after what is in front of it."""
    try:
        yield from chunks
    except Exception as error:
        failures.append(error)


def _shared_out(work: Callable[[_In], _Out], chunks: Iterator[_In], processes: int) -> Iterator[_Out]:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting: collections.deque[tuple[_In, Future[_Out]]] = collections.deque()
    with _told(processes):
        pool = ProcessPoolExecutor(processes, context, _begin, (work,))
    try:
        while True:
            for chunk in islice(chunks, _AHEAD * processes - len(waiting)):
                with _told(processes):
                    waiting.append((chunk, pool.submit(_done, chunk)))
            if not waiting:
                return
            chunk, result = waiting.popleft()
            try:
                with _told(processes):
                    done = _result(pool, result)
            except RecursionError:  # nested too deep to be sent, so that nobody else can say what is wrong
                done = work(chunk)
            yield done
    except WorkerEnded:
        _end_processes(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _told(processes: int) -> Iterator[None]:
    """Raise `WorkerEnded` for what the operating system does to too many processes."""
    try:
        yield
    except BrokenProcessPool as error:
        what = "was ended, most often for want of memory"
        raise WorkerEnded(_sentence(processes, what)) from error
    except (MemoryError, OSError, RuntimeError) as error:
        if not _is_refusal(error):
            raise
        what = f"was refused memory or a place among the processes ({error or 'out of memory'})"
        raise WorkerEnded(_sentence(processes, what)) from error


def _sentence(processes: int, what: str) -> str:
    return (
        f"data.num_proc: one of the {processes} processes that prepare the data {what}: set a smaller "
        "number; what is finished is kept."
    )


def _is_refusal(error: Exception) -> bool:
    """Whether the system has no memory left, or no process or thread for this user or container."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOMEM, errno.EAGAIN)
    return isinstance(error, MemoryError) or "start new thread" in str(error)


def _result(pool: ProcessPoolExecutor, future: Future[_Out]) -> _Out:
    """What ``future`` gives, also where the thread of the pool that would bring it was refused its own."""
    while not wait([future], _LOOK).done:
        if not _has_thread(pool) and not future.done():
            raise RuntimeError("can't start new thread")
    return future.result()


def _has_thread(pool: ProcessPoolExecutor) -> bool:
    thread: Any = pool._executor_manager_thread
    return thread is not None and thread.is_alive()


def _end_processes(pool: ProcessPoolExecutor) -> None:
    """Where the pool has no thread that would: they wait for work, and this process, at its end, for them."""
    if _has_thread(pool):
        return
    for process in list((pool._processes or {}).values()):
        process.kill()
        process.join()
    pool._executor_manager_thread = None  # type: ignore[assignment]  # one that didn't start can't be joined


def _may_not_fork() -> bool:
    return bool(multiprocessing.current_process().daemon)


def _begin(work: Callable[[Any], Any]) -> None:
    """In a new process: what to do with chunks, and to end with the process that asked for it."""
    global _work
    _work = work
    with contextlib.suppress(OSError):  # Linux alone has it, and a container may forbid it
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_END)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, and the first ends the rest
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        end_with_parent(lambda: os._exit(1))
    except RuntimeError:  # no thread is left for this user or container, which the main process tells
        os._exit(1)


def _done(chunk: Any) -> Any:
    return _work(chunk)
