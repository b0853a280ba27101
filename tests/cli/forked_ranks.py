"""What `torchrun` starts, in forks of this process: one fork is one rank, bounded in time."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forks import become
from ports import free_port

from dskd_lightning.cli.main import main


@dataclass(frozen=True)
class Ranks:
    """How the ranks ended.

    Args:
        statuses: exit status of each rank, negative for a signal.
        logs: what each printed.
        seconds: until the last of them ended.
    """

    statuses: tuple[int, ...]
    logs: tuple[str, ...]
    seconds: float


def dskd_ranks(
    *arguments: str,
    folder: Path,
    ranks: int = 2,
    nodes: int = 1,
    prepare: Callable[[int], None] = lambda rank: None,
    expected: int | None = 0,
    timeout: float = 90,
) -> Ranks:
    """Run ``dskd`` on several ranks over gloo; see `in_ranks`.

    Args:
        arguments: the command line.
        prepare: called in each rank first, with its number.
    """

    def run(rank: int) -> int:
        prepare(rank)
        return main(arguments)

    return in_ranks(run, folder=folder, ranks=ranks, nodes=nodes, expected=expected, timeout=timeout)


def in_ranks(
    run: Callable[[int], object],
    *,
    folder: Path,
    ranks: int = 2,
    nodes: int = 1,
    expected: int | None = 0,
    timeout: float = 90,
) -> Ranks:
    """Call ``run`` with the number of each rank; what it returns, if a number, is the status.

    Args:
        run: what each rank does; it may use all that is in memory here.
        folder: where each rank's output goes.
        ranks: how many processes in all.
        nodes: on how many machines they seem to be.
        expected: status that all must end with; None lets them end as they may.
        timeout: seconds until all are killed and the test fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    logs = [folder / f"rank {rank}.log" for rank in range(ranks)]
    for log in logs:
        log.unlink(missing_ok=True)
    begin = time.monotonic()
    per_node = ranks // nodes
    processes = []
    for rank in range(ranks):
        process = os.fork()
        if not process:
            variables = {
                "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % per_node,
                "LOCAL_WORLD_SIZE": per_node, "GROUP_RANK": rank // per_node, "NODE_RANK": rank // per_node,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
            }  # fmt: skip
            os.environ.update({name: str(value) for name, value in variables.items()})
            become(lambda rank=rank: run(rank), logs[rank])
        processes.append(process)
    statuses: dict[int, int] = {}
    while len(statuses) < ranks and time.monotonic() < begin + timeout:
        for process in processes:
            if process not in statuses:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    statuses[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    seconds = time.monotonic() - begin
    hanging = [process for process in processes if process not in statuses]
    for process in hanging:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
    texts = tuple(log.read_text(errors="replace") if log.exists() else "" for log in logs)
    told = "\n".join(f"--- rank {rank}: {text[-3000:]}" for rank, text in enumerate(texts))
    assert not hanging, f"{len(hanging)} ranks hang: {told}"
    result = Ranks(tuple(statuses[process] for process in processes), texts, seconds)
    assert expected is None or set(result.statuses) == {expected}, f"{result.statuses} {told}"
    return result
