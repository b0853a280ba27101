"""`dskd compare` of two runs as their predictions grow: seconds on the wall clock, memory, the report's size.

Run: ``python tests/benchmarks/comparing.py [--prompts 10000 100000]``; responses and references of 20 to 120
words, drawn at random.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from _measure import Measured, Memory, growing, report  # noqa: E402
from conftest import CORPUS  # noqa: E402
from rich.console import Console  # noqa: E402

from dskd_lightning.comparison.compare_runs import compare_runs  # noqa: E402
from dskd_lightning.runs.predictions import Prediction, prediction_file  # noqa: E402

WORDS = " ".join(CORPUS[:2]).split()
COLUMNS = ("prompts", "s", "peak MiB", "report, MiB")


def write_run(folder: Path, prompts: int, seed: int) -> None:
    draw, references = random.Random(seed), random.Random(0)
    (folder / "predictions").mkdir(parents=True)
    with (folder / "predictions" / prediction_file(None)).open("w") as file:
        for index in range(prompts):
            reference, response = (
                " ".join(source.choices(WORDS, k=source.randrange(20, 120))) for source in (references, draw)
            )
            answer = Prediction(index, f"prompt {index}", (reference,), response, tokens=60)
            file.write(answer.to_json() + "\n")


def case(prompts: int) -> None:
    """Measure one size in this process."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, run) for run in ("a", "b")]
        for seed, folder in enumerate(folders, 1):
            write_run(folder, prompts, seed)
        memory, begin = Memory(), time.perf_counter()
        with open("/dev/null", "w") as nowhere:
            compare_runs(folders, output=Path(name, "comparison"), console=Console(file=nowhere))
        seconds = time.perf_counter() - begin
        size = (Path(name, "comparison", "report.html")).stat().st_size / 2**20
        report([seconds], memory, size=size)


def cells(m: Measured) -> list[str]:
    return [f"{m.median:.1f}", f"{m.extra_mb:.0f}", f"{m.more['size']:.2f}"]


def main() -> None:
    sizes = ("--prompts", (10_000, 100_000))
    growing(__file__, __doc__, sizes, case, "Two runs, one response to each prompt", COLUMNS, cells)


if __name__ == "__main__":
    main()
