"""Planning an epoch as the data grow: seconds, memory, and how even the ranks of a step are.

Run: ``python tests/benchmarks/planning.py [--examples 1000000 3000000 10000000]``. Lengths are drawn from a
log-normal distribution (median 240 tokens, at most 2,048). A rank of eight plans the epoch and keeps its
part. Memory is the process's peak above the lengths. "Slowest rank" is how many more padded tokens the
fullest of the eight batches of a step has than their mean, averaged over steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from _measure import Measured, Memory, clock, environment, interleave, print_table, report, rows_of  # noqa: E402

from dskd_lightning.data.batching import BatchPlan, BatchSettings, plan_batches  # noqa: E402
from dskd_lightning.planning.run_sizes import padded_tokens  # noqa: E402

LONGEST, RANKS = 2048, 8
MODES = {
    "8 rows": BatchSettings(8),
    "8 rows, grouped by length": BatchSettings(8, group_by_length=True),
    "budget of 16,384 tokens": BatchSettings(max_tokens=16_384),
    "packed, 8 rows of 2,048": BatchSettings(8, packing=True, max_length=LONGEST),
}
COLUMNS = ("examples", "batches", "s", "peak MiB", "slowest rank above mean")


def drawn(examples: int) -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(np.log(240), 0.8, examples)
    return np.clip(lengths, 8, LONGEST).astype(np.int32)


def unevenness(plan: BatchPlan, lengths: np.ndarray) -> float:
    """How far the fullest batch of a step lies above the mean of its ranks, averaged over whole steps."""
    tokens = padded_tokens(plan, lengths)
    steps = tokens[: len(tokens) // RANKS * RANKS].reshape(-1, RANKS)
    return float((steps.max(1) / steps.mean(1) - 1).mean()) if len(steps) else 0.0


def case(examples: int, mode: str) -> None:
    """Measure one size in this process."""
    lengths = drawn(examples)
    plan_batches(lengths[:1000], MODES[mode])
    memory, begin = Memory(), clock()
    plan = plan_batches(lengths, MODES[mode], seed=1, epoch=0)
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
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.case:
        count, mode = a.case.split(":")
        case(int(count), mode)
        return
    print(f"Plans of an epoch, {RANKS} ranks\n{environment()}")
    for mode in MODES:
        labels = {f"{n}:{mode}": f"{n:,}" for n in a.examples}
        measured = interleave(__file__, {name: [] for name in labels}, a.rounds)
        print_table(mode, COLUMNS, rows_of(measured, labels, len(COLUMNS), cells))


if __name__ == "__main__":
    main()
