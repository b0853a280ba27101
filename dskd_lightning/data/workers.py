"""Work on chunks in several processes, with the results in the order of the chunks."""

from __future__ import annotations

import collections
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from dskd_lightning.errors import UserError
from dskd_lightning.runs.parent import end_with_parent

__all__ = ["WorkerEnded", "worked_in_order"]

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_AHEAD = 2
"""Chunks for each process that wait or are in work, so that memory doesn't grow with the data."""

_work: Callable[[Any], Any]


class WorkerEnded(UserError):
    """A process that worked was ended from outside; nothing is wrong with what it worked on."""


def worked_in_order(work: Callable[[_In], _Out], chunks: Iterable[_In], processes: int) -> Iterator[_Out]:
    """``work`` of every chunk, in their order, in this process or in ``processes`` others.

    An error ends it as in one process: the first chunk that fails is the one that is told, also where
    the source of the chunks has failed further on.

    Args:
        work: can be pickled, as can chunks and results.
        chunks: read here, only as far ahead as keeps the others busy.
        processes: 1 for none but this.

    Raises:
        WorkerEnded: the operating system has ended one of the processes.
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
    pool = ProcessPoolExecutor(processes, context, _begin, (work,))
    try:
        while True:
            for chunk in islice(chunks, _AHEAD * processes - len(waiting)):
                waiting.append((chunk, pool.submit(_done, chunk)))
            if not waiting:
                return
            chunk, result = waiting.popleft()
            try:
                yield result.result()
            except RecursionError:  # nested too deep to be sent, so that nobody else can say what is wrong
                yield work(chunk)
    except BrokenProcessPool as error:
        raise WorkerEnded(
            f"data.num_proc: one of the {processes} processes that prepare the data was ended, most often "
            "for want of memory: set a smaller number; what is finished is kept."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _may_not_fork() -> bool:
    return bool(multiprocessing.current_process().daemon)


def _begin(work: Callable[[Any], Any]) -> None:
    """In a new process: what to do with chunks, and to end with the process that asked for it."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, and the first ends the rest
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(lambda: os._exit(1))


def _done(chunk: Any) -> Any:
    return _work(chunk)
