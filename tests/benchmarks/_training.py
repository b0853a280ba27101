"""The workload that `training_step.py` and `peers.py` share: models, examples and batches."""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from _measure import Memory, clock, device, report
from torch import Tensor
from torch.utils.data import DataLoader

import dskd_lightning as dl
from dskd_lightning.models.spec import PruneSpec
from dskd_lightning.objectives import Objective
from dskd_lightning.structures import DistillationBatch

LR = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="demo", help="instruction file, e.g. Dolly's train.jsonl")
    parser.add_argument("--source", default="demo", help="teacher; the student is cut from it")
    parser.add_argument("--layers", type=int, default=10, help="decoder layers of the student")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--case", help=argparse.SUPPRESS)


def forwarded(a: argparse.Namespace) -> list[str]:
    """The arguments of a case's own process."""
    names = ("data", "source", "layers", "examples", "batch_size", "max_length")
    return [part for n in names for part in (f"--{n.replace('_', '-')}", str(getattr(a, n)))]


def specs(a: argparse.Namespace) -> tuple[dl.TeacherSpec, dl.StudentSpec]:
    student = dl.StudentSpec(a.source, dtype="float32")
    student.prune = PruneSpec(layers=a.layers, by="even")
    return dl.TeacherSpec(a.source, dtype="bfloat16"), student


def batches(
    a: argparse.Namespace, *, by_length: bool = False, pad_to: int = 1, teacher: bool = True
) -> list[DistillationBatch]:
    """The first examples of the data, as one epoch of batches.

    Args:
        by_length: batches of similar lengths up to ``batch_size * max_length`` padded tokens,
            instead of ``batch_size`` rows in a random order.
        pad_to: round row lengths up to a multiple of this.
        teacher: also hold the teacher's tokens.
    """
    teacher_spec, student = specs(a)
    with tempfile.TemporaryDirectory() as cache:
        data = dl.InstructionDataModule(
            a.data, student=student, teacher=teacher_spec if teacher else None, limit=a.examples,
            max_length=a.max_length, max_prompt_length=a.max_length // 2, batch_size=a.batch_size,
            max_tokens_per_batch=a.batch_size * a.max_length if by_length else None,
            pad_to_multiple_of=pad_to, cache_dir=cache,
        )  # fmt: skip
        data.setup("fit")
        return list(data.train_dataloader())


def tokens_of(found: Sequence[DistillationBatch]) -> int:
    """Student tokens, prompts included, padding not."""
    return sum(int(b.student.attention_mask.sum()) for b in found)  # type: ignore[union-attr]


def module_of(a: argparse.Namespace, objective: Objective, *, teacher: bool = True) -> dl.DistillationModule:
    """An untrained module, its models not built yet."""
    teacher_spec, student = specs(a)
    return dl.DistillationModule(student, objective, teacher_spec if teacher else None)


class _Epochs(L.Callback):
    """Warm up on a first epoch of one batch, then time one epoch; losses of the timed one."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            self.memory, self.begin = Memory(), clock()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, idx: int) -> None:
        self.losses.append(float(trainer.callback_metrics["loss"]))
        self.end = clock()


def train_with_lightning(module: dl.DistillationModule, found: list[DistillationBatch]) -> None:
    """Train as users do, through the Trainer, and report the case; the seed draws the projectors.

    The first batch is run once more in front of the timed epoch, as a warm-up.
    """
    warnings.filterwarnings("ignore")
    timer = _Epochs()
    trainer = L.Trainer(
        accelerator="auto", devices=1, logger=False, enable_checkpointing=False, callbacks=[timer],
        enable_progress_bar=False, enable_model_summary=False, max_epochs=1, precision="bf16-mixed",
    )  # fmt: skip
    torch.manual_seed(0)
    module.configure_model()
    trainer.fit(module, train_dataloaders=DataLoader([found[0], *found], batch_size=None))
    finish([timer.end - timer.begin], timer.memory, found, timer.losses[0])


def train_by_hand(
    module: dl.DistillationModule,
    found: list[DistillationBatch],
    loss_of: Callable[[Any, Any, DistillationBatch], tuple[Tensor, int]],
) -> None:
    """The same epoch in a bare loop, on a loss of student, teacher and batch; reports the case.

    ``loss_of`` returns a sum and the number of response tokens that it runs over.
    """
    place = device()
    torch.manual_seed(0)
    module.configure_model()
    module.to(place).train()
    teacher = module.teachers[0] if module.teachers else None
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=LR), []

    def step(batch: DistillationBatch) -> None:
        batch = batch.to(place)
        with torch.autocast(place.type, torch.bfloat16):
            total, count = loss_of(module.student, teacher, batch)
            loss = total / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    step(found[0])
    memory, begin = Memory(), clock()
    for batch in found:
        step(batch)
    finish([clock() - begin], memory, found, losses[0])


def finish(seconds: list[float], memory: Memory, found: Sequence[DistillationBatch], loss: float) -> None:
    padding = 1 - tokens_of(found) / sum(b.student.input_ids.numel() for b in found)
    report(seconds, memory, first_loss=loss, tokens=tokens_of(found), padding=padding, steps=len(found))


def tiny_source(folder: Path) -> tuple[str, str]:
    """A two-layer model and a data file, for a run that only shows that the script works."""
    from conftest import make_tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    rows = [{"prompt": "Write a text.", "response": "the fox jumps over apples " * (1 + i)} for i in range(4)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder), str(folder / "data.jsonl")
