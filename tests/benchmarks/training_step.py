"""An epoch of training: ours, the reference's layout, plain fine-tuning, and models without a loss.

Run: ``python tests/benchmarks/training_step.py [--data FILE] [--examples N] [--batch-size B]``; the
teacher is SmolLM2-135M-Instruct, the student ten of its thirty layers, trained in full. Cases, all
in bf16 autocast with AdamW:

* ``reference layout``: rows padded to ``--max-length``, the teacher run in every step, full logits
  of both models on every position, all layers' hidden states kept, the loss computed plainly.
* ``ours, same batches``: the same examples in the same batches through the Trainer.
* ``ours, by length``: the same examples, batches of similar lengths up to as many padded tokens as
  a batch of the reference holds. An epoch then has fewer optimiser steps.
* ``SFT, by length``: the student alone on those batches.
* ``floor, by length``: teacher forward, student forward and backward of the decoders, no head.

A case's process runs one batch as a warm-up and times the epoch after it. The first loss
(before any update) of ours and of the reference must agree, or the run fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from _measure import Measured, environment, interleave, print_table  # noqa: E402
from _reference import plain_dskd  # noqa: E402
from _training import (  # noqa: E402
    add_arguments,
    batches,
    forwarded,
    module_of,
    train_by_hand,
    train_with_lightning,
)

import dskd_lightning as dl  # noqa: E402
from dskd_lightning.models.output import decoder_hidden, language_head  # noqa: E402

REFERENCE = "reference layout"
CASES = (REFERENCE, "ours, same batches", "ours, by length", "SFT, by length", "floor, by length")
RATIO, TEMPERATURE = 0.5, 2.0


def case(name: str, a: argparse.Namespace) -> None:
    """Measure one case in this process."""
    by_length = name.endswith("by length")
    if name.startswith("SFT"):
        found = batches(a, by_length=by_length, teacher=False)
        train_with_lightning(module_of(a, dl.SFTObjective(), teacher=False), found)
        return
    module = module_of(a, dl.DSKDObjective(kd_ratio=RATIO, temperature=TEMPERATURE))
    if name.startswith("ours"):
        train_with_lightning(module, batches(a, by_length=by_length))
    elif name == REFERENCE:
        objective = module.objectives[0]
        train_by_hand(module, batches(a, pad_to=a.max_length), lambda *args: _reference(objective, *args))
    else:
        train_by_hand(module, batches(a, by_length=True), _floor)


def _reference(objective, student, teacher, batch):  # type: ignore[no-untyped-def]
    tokens, own = batch.student, batch.teachers[0]
    ours = student(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True,
        use_cache=False,
    )  # fmt: skip
    with torch.no_grad():
        theirs = teacher(
            input_ids=own.input_ids, attention_mask=own.attention_mask, output_hidden_states=True,
            use_cache=False,
        )  # fmt: skip
    total = plain_dskd(
        ours.hidden_states[-1], ours.logits, language_head(student).weight,
        theirs.hidden_states[-1], theirs.logits, language_head(teacher).weight,
        objective.t2s, objective.s2t, tokens.labels, RATIO, TEMPERATURE,
    )  # fmt: skip
    return total, len(tokens.response)


def _floor(student, teacher, batch):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        decoder_hidden(teacher, batch.teachers[0])
    hidden = batch.student.select(decoder_hidden(student, batch.student))
    return hidden.float().square().sum(), hidden.shape[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    a = parser.parse_args()
    if a.case:
        case(a.case, a)
        return
    found = interleave(__file__, dict.fromkeys(CASES, forwarded(a)), a.rounds)
    print(f"An epoch of {a.examples} examples of {a.data}\n{environment()}")
    rows = [row(name, measured, found) for name, measured in found.items()]
    columns = (
        "training", "s", "range", "steps", "padding", "tokens/s", "time / reference", "peak MiB above models",
        "process MiB", "memory / reference",
    )  # fmt: skip
    print_table(f"Medians of {a.rounds} rounds; tokens are the student's, unpadded", columns, rows)
    first = [found[name] for name in (REFERENCE, "ours, same batches")]
    if all(isinstance(m, Measured) for m in first):
        ours, theirs = (m.more["first_loss"] for m in first)  # type: ignore[union-attr]
        print(f"\nFirst loss: reference {ours:.4f}, ours {theirs:.4f}")
        if abs(ours / theirs - 1) > 0.02:
            raise SystemExit("the two computations disagree")


def row(name: str, m: Measured | str, found: dict[str, Measured | str]) -> list[str]:
    base = found[REFERENCE]
    if isinstance(m, str):
        return [name, f"failed: {m}", *[""] * 8]
    cells = [name, f"{m.median:.2f}", m.spread, f"{m.more['steps']:.0f}", f"{m.more['padding']:.0%}"]
    cells.append(f"{m.more['tokens'] / m.median:,.0f}")
    cells.append(f"{m.median / base.median:.2f}" if isinstance(base, Measured) else "")
    cells += [f"{m.extra_mb:,.0f}", f"{m.total_mb:,.0f}"]
    # A tiny run may need no more memory than was there before it.
    measured = isinstance(base, Measured) and base.extra_mb > 0
    return [*cells, f"{m.extra_mb / base.extra_mb:.2f}" if measured else ""]  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
