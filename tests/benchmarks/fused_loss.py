"""The loss part of a DSKD step on given hidden states: fused, plain, and the bare matrix products.

Run: ``python tests/benchmarks/fused_loss.py [--vocabulary 32000 50000 152000] [--tokens 512 1024
4096] [--dtype bfloat16 float32] [--train-head]``. *Plain* is the reference's computation on the same
response tokens (its padded layout is measured by ``training_step.py``). The *floor* is the
matrix products that any implementation with four heads must do, in chunks of 512 tokens, their results
thrown away. Heads are frozen, as under LoRA, unless ``--train-head``. The losses of fused and
plain must agree, or the run fails. Sizes whose plain form can't fit are skipped, and that is said.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from _measure import (  # noqa: E402
    Measured,
    Memory,
    available_mb,
    device,
    environment,
    interleave,
    print_table,
    report,
    timed,
)
from _reference import plain_dskd  # noqa: E402
from torch import Tensor  # noqa: E402

from dskd_lightning.objectives import DSKDObjective  # noqa: E402
from dskd_lightning.structures import Head, ModelSpace, Side  # noqa: E402

CASES = ("floor", "fused", "plain")
RATIO, TEMPERATURE = 0.5, 2.0


def plain_mb(tokens: int, vocab: int, dtype: str) -> float:
    """MiB of the plain form: some twelve float32 tensors of the vocabulary's size and four logits."""
    return tokens * vocab * (12 * 4 + 4 * getattr(torch, dtype).itemsize) / 2**20


def case(name: str, a: argparse.Namespace) -> None:
    """Measure one case in this process."""
    torch.manual_seed(0)
    place, dtype = device(), getattr(torch, a.dtype[0])
    n, vocab, d, e = a.tokens[0], a.vocabulary[0], a.hidden, a.teacher_hidden

    def random(rows: int, columns: int, scale: float) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=place).normal_(0, scale)

    hidden, teacher_hidden = random(n, d, 1.0).requires_grad_(), random(n, e, 1.0)
    weight, teacher_weight = random(vocab, d, d**-0.5).requires_grad_(a.train_head), random(vocab, e, e**-0.5)
    labels = torch.randint(0, vocab, (n,), device=place)
    objective = DSKDObjective(kd_ratio=RATIO, temperature=TEMPERATURE)
    objective.configure(
        ModelSpace(Head(weight), weight, None), ModelSpace(Head(teacher_weight), teacher_weight, None)
    )

    def fused(rows: int) -> Tensor:
        y, h, t = labels[:rows], hidden[:rows], teacher_hidden[:rows]
        student = Side(h, Head(weight), weight, y, y, torch.zeros_like(y))
        teacher = Side(t, Head(teacher_weight), teacher_weight, y, y, torch.zeros_like(y))
        return objective(student, teacher).loss

    def plain(rows: int) -> Tensor:
        h, t = hidden[:rows], teacher_hidden[:rows]
        return plain_dskd(
            h, h @ weight.T, weight, t, t @ teacher_weight.T, teacher_weight,
            objective.t2s, objective.s2t, labels[:rows], RATIO, TEMPERATURE,
        )  # fmt: skip

    def step(loss_of: Callable[[int], Tensor], rows: int) -> float:
        hidden.grad = weight.grad = None
        objective.zero_grad()
        loss = loss_of(rows)
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def floor(rows: int) -> float:
        for start in range(0, rows, 512):
            h, t = hidden[start : min(start + 512, rows)], teacher_hidden[start : min(start + 512, rows)]
            for states, matrix, backward in (
                (h, weight, True),  # student
                (h, weight, True),  # projected teacher: as wide as the student's states
                (t, teacher_weight, False),  # teacher
                (t, teacher_weight, True),  # projected student
            ):
                logits = states @ matrix.T
                if backward:
                    logits @ matrix
            if a.train_head:
                logits = h @ weight.T
                logits.T @ h
        return 0.0

    runs = {"floor": floor, "fused": lambda r: step(fused, r), "plain": lambda r: step(plain, r)}
    runs[name](min(32, n))  # warm-up: libraries, thread pools
    memory, losses = Memory(), []
    seconds = timed(lambda: losses.append(runs[name](n)), a.repeat)
    report(seconds, memory, loss=losses[-1])


def compare(a: argparse.Namespace) -> None:
    sides = f"hidden {a.hidden}/{a.teacher_hidden}, {'trained' if a.train_head else 'frozen'} student head"
    print(f"Loss part of a DSKD step, {sides}\n{environment()}")
    rows = []
    for dtype in a.dtype:
        for vocab in a.vocabulary:
            for tokens in a.tokens:
                rows.append(compare_one(a, dtype, vocab, tokens))
                print(*rows[-1], file=sys.stderr, flush=True)
    columns = (
        "dtype, vocabulary, tokens", "floor s", "fused s", "plain s", "fused / floor", "fused / plain",
        "fused MiB", "plain MiB", "plain / fused MiB",
    )  # fmt: skip
    print_table(f"Medians of {a.rounds} interleaved rounds, MiB above the inputs", columns, rows)


def compare_one(a: argparse.Namespace, dtype: str, vocab: int, tokens: int) -> list[str]:
    """One row of the table."""
    arguments = [
        "--dtype", dtype, "--vocabulary", str(vocab), "--tokens", str(tokens), "--hidden", str(a.hidden),
        "--teacher-hidden", str(a.teacher_hidden), "--repeat", str(a.repeat),
        *(["--train-head"] if a.train_head else []),
    ]  # fmt: skip
    limit = min(a.limit_mb, 0.9 * available_mb())
    need = plain_mb(tokens, vocab, dtype)
    cases = [name for name in CASES if name != "plain" or need <= limit]
    found = interleave(__file__, dict.fromkeys(cases, arguments), a.rounds)
    floor, fused, plain = (found.get(name, f"skipped: {need / 1024:.0f} GiB needed") for name in CASES)
    row = [f"{dtype}, {vocab:,}, {tokens:,}"]
    row += [f"{m.median:.2f}" if isinstance(m, Measured) else m for m in (floor, fused, plain)]
    if not (isinstance(floor, Measured) and isinstance(fused, Measured)):
        return [*row, "", "", "", "", ""]
    row.append(f"{fused.median / floor.median:.2f}")
    if not isinstance(plain, Measured):
        return [*row, "", f"{fused.extra_mb:,.0f}", "", ""]
    difference = abs(fused.more["loss"] / plain.more["loss"] - 1)
    if difference > (1e-2 if dtype == "bfloat16" else 1e-4):
        raise SystemExit(f"fused and plain disagree by {difference:.1e} at {row[0]}")
    memory = (
        f"{fused.extra_mb:,.0f}", f"{plain.extra_mb:,.0f}", f"{plain.extra_mb / max(fused.extra_mb, 1):.1f}",
    )  # fmt: skip
    return [*row, f"{fused.median / plain.median:.2f}", *memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 50_000, 152_000])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--hidden", type=int, default=896, help="of the student")
    parser.add_argument("--teacher-hidden", type=int, default=2048)
    parser.add_argument("--train-head", action="store_true")
    parser.add_argument("--limit-mb", type=float, default=18 * 1024, help="skip plain forms above this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1, help="measured steps in each round")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        case(arguments.case, arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
