"""Beside TRL's GKDTrainer and Liger's fused linear JSD: the same models, batches and token ids.

Run: ``python tests/benchmarks/peers.py [--trl-python PYTHON]``. TRL was installed apart, so that the
package never depends on it, and is used where the given interpreter (or this one) can import it::

    python -m venv trl-env                       # beside the environment of the package
    trl-env/bin/pip install trl==1.16.0          # with torch 2.13, transformers 5.24 and this package
    python tests/benchmarks/peers.py --trl-python trl-env/bin/python

TRL runs its own trainer (``trl.experimental.gkd.GKDTrainer``, ``lmbda=0``: no generation) on the
batches that ours reads, handed over as ready tensors; its loss is the Jensen-Shannon divergence of
full logits, ``beta=0.5``. Ours runs through the Trainer: the same divergence (``logit KD``), then
DSKD, which computes four heads instead of two. Liger's kernels are Triton: CUDA only.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from _measure import device, environment, interleave, print_table  # noqa: E402
from _training import (  # noqa: E402
    LR,
    add_arguments,
    batches,
    finish,
    forwarded,
    module_of,
    train_by_hand,
    train_with_lightning,
)
from _trl import COLUMNS, StepTimer, imports, rows_beside  # noqa: E402

import dskd_lightning as dl  # noqa: E402
from dskd_lightning.functional import JensenShannon  # noqa: E402
from dskd_lightning.models.output import decoder_hidden, language_head  # noqa: E402
from dskd_lightning.objectives import LogitKDObjective  # noqa: E402

TRL, LIGER = "TRL GKDTrainer", "Liger fused linear JSD"
OURS = ("ours, logit KD", "ours, DSKD", "ours, logit KD, by length", "ours, DSKD, by length")


def case(name: str, a: argparse.Namespace) -> None:
    """Measure one case in this process."""
    kd = LogitKDObjective(divergence=JensenShannon(0.5), kd_ratio=1.0, temperature=1.0)
    if name == TRL:
        _trl(a)
    elif name == LIGER:
        train_by_hand(module_of(a, kd), batches(a), _liger)
    else:
        objective = kd if "logit KD" in name else dl.DSKDObjective()
        train_with_lightning(module_of(a, objective), batches(a, by_length="by length" in name))


def _liger(student, teacher, batch):  # type: ignore[no-untyped-def]
    from liger_kernel.transformers import LigerFusedLinearJSD

    ours = batch.student.select(decoder_hidden(student, batch.student))
    with torch.no_grad():
        theirs = batch.teachers[0].select(decoder_hidden(teacher, batch.teachers[0]))
    heads = language_head(student).weight.to(ours.dtype), language_head(teacher).weight.to(ours.dtype)
    loss = LigerFusedLinearJSD(jsd_beta=0.5)(ours, heads[0], theirs.to(ours.dtype), heads[1])
    return loss * len(ours), len(ours)


def _trl(a: argparse.Namespace) -> None:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    found = batches(a)
    module = module_of(a, LogitKDObjective())
    module.configure_model()

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        tokens = [found[0], *found][rows[0]["index"]].student
        labels = torch.full_like(tokens.labels, -100)
        labels[:, 1:] = tokens.labels[:, :-1]  # TRL shifts them itself
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "labels": labels}

    from datasets import Dataset

    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        settings = GKDConfig(
            output_dir=folder, lmbda=0.0, beta=0.5, temperature=1.0, per_device_train_batch_size=1,
            num_train_epochs=1, learning_rate=LR, bf16=True, gradient_checkpointing=False, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True, train_sampling_strategy="sequential",
            use_cpu=device().type == "cpu", max_length=a.max_length,
        )  # fmt: skip
        trainer = GKDTrainer(
            model=module.student, teacher_model=module.teachers[0], args=settings, data_collator=collate,
            train_dataset=Dataset.from_dict({"index": list(range(1 + len(found)))}),
            processing_class=module.tokenizer, callbacks=[timer],
        )  # fmt: skip
        trainer.train()
    finish([timer.seconds], timer.memory, found, timer.losses[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--trl-python", default=os.environ.get("TRL_PYTHON", sys.executable))
    a = parser.parse_args()
    if a.case:
        case(a.case, a)
        return
    names, skipped = list(OURS), []
    if imports(a.trl_python, "trl"):
        names.insert(0, TRL)
    else:
        skipped.append(f"{TRL}: {a.trl_python} has no trl")
    if device().type == "cpu":
        skipped.append(f"{LIGER}: its Triton kernels need CUDA")
    elif importlib.util.find_spec("liger_kernel") is None:
        skipped.append(f"{LIGER}: liger-kernel isn't installed")
    else:
        names.append(LIGER)
    found = interleave(__file__, dict.fromkeys(names, forwarded(a)), a.rounds, {TRL: a.trl_python})
    print(f"An epoch of {a.examples} examples of {a.data}\n{environment()}")
    losses = ["" if isinstance(m, str) else f"{m.more['first_loss']:.4f}" for m in found.values()]
    rows = [[*row, loss] for row, loss in zip(rows_beside(found, TRL), losses, strict=True)]
    title = f"Medians of {a.rounds} rounds; tokens are the student's, unpadded"
    print_table(title, (*COLUMNS, "first loss"), rows)
    print("", *(f"Skipped: {reason}" for reason in skipped), sep="\n")


if __name__ == "__main__":
    main()
