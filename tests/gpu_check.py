"""Checks for the hour in which a GPU is at hand: ``make gpu-check``, or ``python3 -m tests.gpu_check``.

Every objective against the CPU, whole training runs, generation, memory and speed; each check prints
a line when it ends, and the table comes last. The package needn't be installed, and nothing is
downloaded. ``--device cpu`` and ``--device pretended`` (`pretended_gpu`) run the same lines at small
sizes, to find mistakes beforehand.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT),
    *(str(ROOT / "tests" / folder) for folder in (".", "objectives", "benchmarks", "cli")),
]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MODULES = ("losses", "training", "features", "speed", "peers", "compiled")


@dataclass
class Result:
    """What became of one check: ``ok``, ``FAILED``, ``skipped`` or ``not run``."""

    name: str
    outcome: str
    seconds: float
    detail: str


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in the main thread after ``seconds``."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(max(seconds, 1))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run_one(name: str, check: Callable[[], str], seconds: int) -> Result:
    """Run a check and say in one line what it found, or where it broke."""
    from _pytest.outcomes import Skipped

    begin, outcome = time.perf_counter(), "ok"
    try:
        with limited(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detail = check()
    except Skipped as skipped:
        outcome, detail = "skipped", str(skipped)
    except ModuleNotFoundError as error:
        outcome, detail = "skipped", f"{error.name} isn't installed"
    except (Exception, SystemExit) as error:
        outcome, detail = "FAILED", f"{type(error).__name__}: {error} at {place(error)}"
    return Result(name, outcome, time.perf_counter() - begin, " ".join(detail.split())[:300])


def place(error: BaseException) -> str:
    """The innermost line of the package, else of the tests, that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    for part in ("dskd_lightning", "tests"):
        found = [f for f in frames if f.filename.startswith(str(ROOT / part))]
        if found and not found[-1].filename.endswith("gpu_check.py"):
            return f"{Path(found[-1].filename).relative_to(ROOT)}:{found[-1].lineno}"
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"


def checks(device: str, only: str) -> list[tuple[str, Callable[[], str]]]:
    """All checks, the most telling first; building them makes no model."""
    from gpu_checks.setup import Setup

    setup, found = Setup(device), []
    for module in MODULES:
        found += list(importlib.import_module(f"gpu_checks.{module}").checks(setup))
    return [(name, check) for name, check in found if re.search(only, name)]


def machine(device: str) -> str:
    """The device and the versions, in one line."""
    import torch
    from _measure import environment

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here: --device cpu runs the checks without one")
    return environment()


@contextmanager
def quiet() -> Iterator[None]:
    """Errors alone are logged."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "dskd_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu", "pretended"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no check after this long")
    parser.add_argument("--each", type=int, default=120, help="most seconds of one check")
    parser.add_argument("--only", default="", help="checks whose names this regular expression finds")
    parser.add_argument("--json", type=Path, help="write the results here, after every check")
    a = parser.parse_args(arguments)
    if a.device != "pretended":
        return run_all(a)
    from pretended_gpu import PretendedGpu

    with PretendedGpu():
        return run_all(a)


@quiet()
def run_all(a: argparse.Namespace) -> int:
    """Run the checks, print them, and return the exit status."""
    begin, results = time.perf_counter(), []
    title = machine(a.device)
    print(title, flush=True)
    for name, check in checks(a.device, a.only):
        left = 60 * a.minutes - (time.perf_counter() - begin)
        if left <= 0:
            results.append(Result(name, "not run", 0.0, f"{a.minutes:g} minutes were over"))
        else:
            results.append(run_one(name, check, min(a.each, int(left) + 1)))
        r = results[-1]
        print(f"{r.outcome:8s} {r.seconds:6.1f} s  {name}: {r.detail}", flush=True)
        if a.json:
            a.json.write_text(json.dumps({"machine": title, "checks": list(map(asdict, results))}, indent=1))
    width = max((len(r.name) for r in results), default=0)
    print(f"\n{title}\n\n| {'check':{width}} | outcome |      s | found")
    print(f"|{'-' * (width + 2)}|---------|-------:|---")
    for r in results:
        print(f"| {r.name:{width}} | {r.outcome:7s} | {r.seconds:6.1f} | {r.detail}")
    failed = sum(r.outcome == "FAILED" for r in results)
    print(f"{failed} of {len(results)} failed, {time.perf_counter() - begin:.0f} s in all", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
