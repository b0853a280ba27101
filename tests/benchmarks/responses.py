"""Responses to ever more prompts, two seeds each: seconds on the wall clock and memory above the prompts.

Run: ``python tests/benchmarks/responses.py [--prompts 1000 10000 100000]``. No model answers, but a stub that
draws 20 to 120 words at random: what is measured is what `predict` does around a model, and the scores.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from _measure import Measured, Memory, growing, report  # noqa: E402
from conftest import CORPUS  # noqa: E402

from dskd_lightning.callbacks.responses import response_scores  # noqa: E402
from dskd_lightning.evaluation.predict import PromptRecord, predict  # noqa: E402
from dskd_lightning.generation.generator import Generation, GenerationSettings  # noqa: E402

WORDS = " ".join(CORPUS[:2]).split()
SEEDS = (10, 20)
COLUMNS = ("prompts", "predict, s", "peak MiB", "with scores, s", "peak MiB")


class Stub:
    """Answers as `Generator` does, without a model."""

    settings = GenerationSettings(max_new_tokens=120)

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, seed: int, indices: Sequence[int]
    ) -> Iterator[list[Generation]]:
        size = self.settings.batch_size
        for start in range(0, len(prompts), size):
            yield [
                Generation(at, words(f"{seed} {at}"), (1,) * 60, 0) for at in indices[start : start + size]
            ]


def words(drawn_by: str) -> str:
    draw = random.Random(drawn_by)
    return " ".join(draw.choices(WORDS, k=draw.randrange(20, 120)))


def case(prompts: int) -> None:
    """Measure one size in this process."""
    records = [
        PromptRecord(at, f"prompt {at}", list(range(at, at + 60)), (words(f"{at}"),)) for at in range(prompts)
    ]
    with tempfile.TemporaryDirectory() as name:
        memory, begin = Memory(), time.perf_counter()
        predictions = predict(Stub(), records, name, model_id="stub", seeds=SEEDS)  # type: ignore[arg-type]
        predicted, peak = time.perf_counter() - begin, memory.extra
        response_scores(predictions)
        report([time.perf_counter() - begin], memory, predicted=predicted, peak=peak)


def cells(m: Measured) -> list[str]:
    return [f"{m.more['predicted']:.1f}", f"{m.more['peak']:.0f}", f"{m.median:.1f}", f"{m.extra_mb:.0f}"]


def main() -> None:
    sizes = ("--prompts", (1_000, 10_000, 100_000))
    growing(__file__, __doc__, sizes, case, "Responses of two seeds", COLUMNS, cells)


if __name__ == "__main__":
    main()
