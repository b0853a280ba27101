"""What the benchmarks beside TRL's trainers share."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import Any

from _measure import Measured, Memory, clock
from transformers import TrainerCallback

COLUMNS = ("training", "s", "range", "tokens/s", "peak MiB above models", "speed / TRL", "memory / TRL")


class StepTimer(TrainerCallback):
    """Times a run from its second step on, as a first one warms up; keeps the logged losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.memory, self.begin = Memory(), clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.end = clock()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.losses.append((logs or {}).get("loss", 0.0))

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def imports(python: str, module: str) -> bool:
    """Whether an interpreter finds a module."""
    check = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", check], check=False).returncode == 0


def rows_beside(found: Mapping[str, Measured | str], base: str) -> list[list[str]]:
    """Cells of `COLUMNS` for every case, with ratios to the case ``base`` where it was measured."""
    reference = found.get(base)
    rows = []
    for name, m in found.items():
        if isinstance(m, str):
            rows.append([name, f"failed: {m}", *[""] * (len(COLUMNS) - 2)])
            continue
        ratios = ["", ""]
        if isinstance(reference, Measured):
            speed, memory = reference.median / m.median, m.extra_mb / reference.extra_mb
            ratios = [f"{speed:.2f}", f"{memory:.2f}"]
        speed_of = f"{m.more['tokens'] / m.median:,.0f}"
        rows.append([name, f"{m.median:.2f}", m.spread, speed_of, f"{m.extra_mb:,.0f}", *ratios])
    return rows
