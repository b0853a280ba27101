"""Planning an epoch as the data grow: seconds, memory, and how even the ranks of a step are.

Run: ``python tests/benchmarks/planning.py [--examples 1000000 3000000 10000000]``. Lengths are drawn from a
log-normal distribution (median 240 tokens, at most 2,048). A rank of eight plans the epoch and keeps its
part. Memory is the process's peak above the lengths. "Slowest rank" is how many more padded tokens the
fullest of the eight batches of a step has than their mean, averaged over steps. With teachers that have a
name, half of the examples, drawn at random, ask all of them and a quarter each one of two. With
``data.weights`` the epoch is mixed of four files before it is planned: places for twice the first, all of the
second, half of the third and one and a half of the last.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from _measure import Measured, Memory, clock, environment, interleave, print_table, report, rows_of  # noqa: E402

from dskd_lightning.data.batching import BatchPlan, BatchSettings, plan_batches  # noqa: E402
from dskd_lightning.data.mixing import mix  # noqa: E402
from dskd_lightning.planning.run_sizes import padded_tokens  # noqa: E402

LONGEST, RANKS = 2048, 8
EIGHT, BUDGET = BatchSettings(8), BatchSettings(max_tokens=16_384)


@dataclass(frozen=True)
class Mode:
    """What is planned.

    Args:
        settings: of the batches.
        teachers: whether examples name theirs.
        weights: of the files; none for every example once.
    """

    settings: BatchSettings
    teachers: bool = False
    weights: tuple[float, ...] = ()


MODES = {
    "8 rows": Mode(EIGHT),
    "8 rows, grouped by length": Mode(BatchSettings(8, group_by_length=True)),
    "budget of 16,384 tokens": Mode(BUDGET),
    "packed, 8 rows of 2,048": Mode(BatchSettings(8, packing=True, max_length=LONGEST)),
    "8 rows, named teachers": Mode(EIGHT, teachers=True),
    "budget of 16,384 tokens, named teachers": Mode(BUDGET, teachers=True),
    "weights, 8 rows": Mode(EIGHT, weights=(2, 1, 0.5, 1.5)),
}
COLUMNS = ("examples", "batches", "s", "peak MiB", "slowest rank above mean")


def drawn(examples: int) -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(np.log(240), 0.8, examples)
    return np.clip(lengths, 8, LONGEST).astype(np.int32)


def kinds_of(mode: Mode, examples: int) -> np.ndarray:
    """The file of each example, or its teacher, -1 for all of them."""
    if mode.weights:
        return np.arange(examples) * len(mode.weights) // examples
    return np.array([-1, -1, 0, 1], np.int16)[np.random.default_rng(1).integers(4, size=examples)]


def planned(
    mode: Mode, rows: np.ndarray, lengths: np.ndarray, kinds: np.ndarray
) -> tuple[BatchPlan, np.ndarray]:
    """An epoch's batches, and the tokens of what they hold.

    Args:
        mode: what is planned.
        rows: of the dataset.
        lengths: tokens of each row.
        kinds: as of `kinds_of`.
    """
    if mode.weights:
        lengths = mix(rows, lengths, kinds, mode.weights, 1).lengths
    groups = kinds if mode.teachers else None
    return plan_batches(lengths, mode.settings, seed=1, epoch=0, groups=groups), lengths


def unevenness(plan: BatchPlan, lengths: np.ndarray) -> float:
    """How far the fullest batch of a step lies above the mean of its ranks, averaged over whole steps."""
    tokens = padded_tokens(plan, lengths)
    steps = tokens[: len(tokens) // RANKS * RANKS].reshape(-1, RANKS)
    return float((steps.max(1) / steps.mean(1) - 1).mean()) if len(steps) else 0.0


def case(examples: int, mode: str) -> None:
    """Measure one size in this process."""
    how, rows, lengths = MODES[mode], np.arange(examples), drawn(examples)
    planned(how, rows[:1000], lengths[:1000], kinds_of(how, 1000))
    kinds = kinds_of(how, examples)
    memory, begin = Memory(), clock()
    plan, lengths = planned(how, rows, lengths, kinds)
    plan.of_rank(0, RANKS)
    seconds = clock() - begin
    memory.end()
    uneven, count = unevenness(plan, lengths), len(plan)
    report([seconds], memory, uneven=uneven, batches=count)


def cells(m: Measured) -> list[str]:
    count, uneven = f"{int(m.more['batches']):,}", f"{m.more['uneven']:.1%}"
    return [count, f"{m.median:.2f}", f"{m.extra_mb:.0f}", uneven]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, nargs="+", default=[1_000_000, 3_000_000, 10_000_000])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.case:
        count, mode = a.case.split(":")
        case(int(count), mode)
        return
    print(f"Plans of an epoch, {RANKS} ranks\n{environment()}")
    for mode in a.modes:
        labels = {f"{n}:{mode}": f"{n:,}" for n in a.examples}
        measured = interleave(__file__, {name: [] for name in labels}, a.rounds)
        print_table(mode, COLUMNS, rows_of(measured, labels, len(COLUMNS), cells))


if __name__ == "__main__":
    main()
