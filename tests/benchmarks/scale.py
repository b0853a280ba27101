"""The calculator beside counted steps: memory, traffic and operations of one and two ranks at three sizes.

Run: ``python tests/benchmarks/scale.py [--sizes small middle large]``. Models are drawn at random, Llamas,
the teacher half as wide again; DSKD, every weight trained, float32, processes that talk through gloo. Memory
is the most bytes that all tensors of a rank took together in the second step, without Python and torch. Sent
is what a rank's collectives must send, each byte once, beside what the kernel says its connections sent: to
scatter sums, gloo sums everything on every rank, which NCCL doesn't. Nothing depends on the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from _measure import MIB, environment, print_table  # noqa: E402
from _tracked import SIZES, Counted, count  # noqa: E402

LAYOUTS = {
    "one rank": {"ranks": 1},
    "2 ranks, DDP": {"ranks": 2, "strategy": "ddp"},
    "2 ranks, FSDP2": {"ranks": 2, "strategy": "fsdp2"},
}
COLUMNS = (
    "models, layout", "memory, MiB", "calculated", "ratio", "sent, MiB", "calculated", "ratio",
    "by the kernel", "GFLOP", "calculated", "ratio",
)  # fmt: skip


def row(name: str, found: Counted) -> list[str]:
    """Counted and calculated of one run."""
    cells = [name]
    for counted, calculated, unit, digits in (
        (found.peak, found.expected_peak, MIB, 1),
        (found.sent, found.estimate.sent, MIB, 2),
        (found.operations, found.expected_operations, 1e9, 1),
    ):
        if counted:
            values = (counted / unit, calculated / unit)
            cells += [*(f"{value:,.{digits}f}" for value in values), f"{calculated / counted:.2f}"]
        else:
            cells += ["", "", ""]
        if unit == MIB and digits == 2:
            cells.append(f"{found.wire / MIB:,.2f}" if found.wire else "")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    a = parser.parse_args()
    rows = []
    for size in a.sizes:
        for layout, changes in LAYOUTS.items():
            with tempfile.TemporaryDirectory() as folder:
                case = replace(SIZES[size], **changes)  # type: ignore[arg-type]
                rows.append(row(f"{size}, {layout}", count(case, Path(folder))))
    print(f"The calculator beside counted steps\n{environment()}")
    print_table("Of one rank and one step", COLUMNS, rows)


if __name__ == "__main__":
    main()
