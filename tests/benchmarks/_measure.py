"""Run each case in a process of its own, take turns, and set the medians side by side.

A script that compares cases calls itself with ``--case NAME`` for every one of them; that process
prints one line of JSON. Rounds interleave the cases, so that a busy spell of the machine falls on
all of them. Memory is the process's resident high-water mark (``VmHWM``, reset before the
measured part where the kernel allows it), or CUDA's peak of allocated memory. Cases run on one
thread unless ``OMP_NUM_THREADS`` says otherwise: threads that wait for each other at every small
operation measure the scheduler on a machine with other work. Seconds on one thread are CPU seconds of the
process, which on a free core are wall-clock seconds; on several threads and on CUDA, wall-clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dskd_lightning.memory import status_bytes

MIB = 2**20
THREADS = os.environ.get("OMP_NUM_THREADS", "1")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock() -> float:
    """Seconds now: see the module's docstring."""
    synchronize()
    return time.perf_counter() if torch.cuda.is_available() or THREADS != "1" else time.process_time()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Memory:
    """Peak memory in MiB from now on, above what is held now (``extra``) and in all (``total``)."""

    _ended: float | None = None

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / MIB
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts from VmRSS
        except OSError:
            print("the high-water mark can't be reset here: it includes preparation", file=sys.stderr)
        self.before = status_bytes("VmRSS") / MIB

    def end(self) -> None:
        """What is held from now on doesn't count."""
        self._ended = self.total

    @property
    def total(self) -> float:
        if self._ended is not None:
            return self._ended
        cuda = torch.cuda.is_available()
        return (torch.cuda.max_memory_allocated() if cuda else status_bytes("VmHWM")) / MIB

    @property
    def extra(self) -> float:
        return self.total - self.before


def timed(function: Callable[[], object], repeat: int) -> list[float]:
    """Seconds of each of ``repeat`` calls."""
    seconds = []
    for _ in range(repeat):
        begin = clock()
        function()
        seconds.append(clock() - begin)
    return seconds


def report(seconds: Sequence[float], memory: Memory, **more: float) -> None:
    """The line that a case's process ends with."""
    result = {"seconds": list(seconds), "extra_mb": memory.extra, "total_mb": memory.total, **more}
    print(json.dumps(result), flush=True)


@dataclass
class Measured:
    """One case over all rounds.

    Args:
        seconds: of each measurement.
        extra_mb: peak MiB above what was held before, the median of the rounds.
        total_mb: peak MiB of the process, the median of the rounds.
        more: the other figures that the case reported, of the last round.
    """

    seconds: list[float]
    extra_mb: float
    total_mb: float
    more: dict[str, float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        return f"{min(self.seconds):.2f} to {max(self.seconds):.2f}"


Cells = Callable[[Measured], list[str]]


def interleave(
    script: str | Path,
    cases: dict[str, Sequence[str]],
    rounds: int,
    python: dict[str, str] | None = None,
) -> dict[str, Measured | str]:
    """Each case's measurements over ``rounds``, or why it failed.

    Args:
        script: the file that understands ``--case NAME``.
        cases: arguments of each case, by its name.
        rounds: how often every case runs.
        python: another interpreter for some cases.
    """
    lines: dict[str, list[dict]] = {name: [] for name in cases}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, arguments in cases.items():
            if name in failed:
                continue
            interpreter = (python or {}).get(name, sys.executable)
            command = [interpreter, str(script), "--case", name, *arguments]
            variables = {"OMP_NUM_THREADS": THREADS, **os.environ}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
            if done.returncode:
                lost = (done.stderr.strip() or f"ended with status {done.returncode}").splitlines()[-1]
                failed[name] = lost
                print(f"{name}: {lost}", file=sys.stderr)
            else:
                lines[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    results: dict[str, Measured | str] = {}
    for name, found in lines.items():
        if name in failed:
            results[name] = failed[name]
            continue
        results[name] = Measured(
            [s for line in found for s in line["seconds"]],
            statistics.median(line["extra_mb"] for line in found),
            statistics.median(line["total_mb"] for line in found),
            {k: v for k, v in found[-1].items() if k not in ("seconds", "extra_mb", "total_mb")},
        )
    return results


def rows_of(
    measured: Mapping[str, Measured | str], labels: Mapping[str, str], width: int, cells: Cells
) -> list[list[str]]:
    """A table's row for each case, which says so where the case failed.

    Args:
        measured: of `interleave`.
        labels: the first cell of each case's row.
        width: cells of a row.
        cells: the others, of what was measured.
    """
    rows = []
    for name, found in measured.items():
        others = [f"failed: {found}", *[""] * (width - 2)] if isinstance(found, str) else cells(found)
        rows.append([labels[name], *others])
    return rows


def growing(
    script: str,
    description: str | None,
    sizes: tuple[str, Sequence[int]],
    case: Callable[[int], None],
    title: str,
    columns: Sequence[str],
    cells: Cells,
) -> None:
    """The command line of a script that measures one thing in ever larger sizes, a row of the table each.

    Args:
        script: the caller's file.
        description: for ``--help``.
        sizes: their option, such as ``--prompts``, and the usual ones.
        case: measures one size in this process and calls `report`.
        title: of the table.
        columns: of the table.
        cells: of a row but for the first, see `rows_of`.
    """
    option, usual = sizes
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(option, dest="sizes", type=int, nargs="+", default=usual)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.case:
        case(a.case)
        return
    measured = interleave(script, {str(n): [] for n in a.sizes}, a.rounds)
    rows = rows_of(measured, {str(n): f"{n:,}" for n in a.sizes}, len(columns), cells)
    print(environment())
    print_table(title, columns, rows)


def available_mb() -> float:
    """MiB that a new process can take."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / MIB
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    return 0.0


def environment() -> str:
    """The machine and the versions, in one line."""
    import lightning
    import transformers

    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    else:
        names = [n for n in Path("/proc/cpuinfo").read_text().splitlines() if n.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else platform.machine()
        load = os.getloadavg()[0]
        used = "one thread used, CPU seconds" if THREADS == "1" else f"{THREADS} threads used, wall clock"
        where = f"{os.cpu_count()} CPU cores ({model}), {used}, load {load:.1f}"
    return (
        f"{where}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, lightning {lightning.__version__}"
    )


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table, padded to be read in a terminal too; all but the first column right-aligned."""
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    print(f"\n**{title}**\n", line(cells[0]), line(rule), *map(line, cells[1:]), sep="\n", flush=True)
