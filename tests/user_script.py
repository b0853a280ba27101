"""What a project of one's own writes: clean under ``mypy --strict``, as `make types` asks. Never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import dskd_lightning as dl
from dskd_lightning import (
    Alignment,
    DistillationBatch,
    DistillationCollator,
    DistillationModule,
    Divergence,
    DSKDObjective,
    InstructionDataModule,
    Loaded,
    Objective,
    ObjectiveOutput,
    Side,
    WholeSteps,
    load_student,
    mean_over_step,
    windows,
)


class Hellinger(Divergence):
    """A divergence of one's own."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        student, teacher = (logits.softmax(-1).sqrt() for logits in (student_logits, teacher_logits))
        return (student - teacher).square().sum(-1)


class Smoothed(Objective):
    """An objective of one's own."""

    def forward(
        self, student: Side, teacher: Side | None = None, alignment: Alignment | None = None
    ) -> ObjectiveOutput:
        logits = student.head.logits(student.hidden)
        loss = torch.nn.functional.cross_entropy(logits, student.labels, reduction="sum")
        return ObjectiveOutput(loss, torch.tensor(len(student)))


class WithPenalty(DistillationModule):
    """A module with a term of one's own."""

    def training_step(self, batch: DistillationBatch, batch_idx: int) -> Tensor:
        penalty: Tensor = self.student.lm_head.weight.square().mean()
        return super().training_step(batch, batch_idx) + 0.1 * penalty


class Mine(L.LightningModule):
    """A LightningModule of one's own."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def configure_callbacks(self) -> list[L.Callback]:
        return [WholeSteps(self.objective)]

    def step(self, student: Side, teacher: Side, batch: DistillationBatch) -> Tensor:
        output: ObjectiveOutput = self.objective(student, teacher, batch.alignments[0])
        return mean_over_step(output.loss, batch, self)


def loaded(folder: str) -> Loaded:
    return Loaded(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


def main(teacher_folder: str, student_folder: str, out: Path) -> None:
    student, teacher = loaded(student_folder), loaded(teacher_folder)
    message = {"role": "user", "content": "Why?"}
    rows: list[dict[str, Any]] = [{"messages": [message, {"role": "assistant", "content": "So."}]}]
    objective = DSKDObjective(divergence=Hellinger(), temperature=2.0)
    module = WithPenalty(student, objective, teacher, lambda groups: torch.optim.AdamW(groups, lr=1e-4))
    collator = DistillationCollator(student, teacher)
    loader = DataLoader(cast("Dataset[dict[str, Any]]", rows), batch_size=8, collate_fn=collator)
    trainer = L.Trainer(max_epochs=1)
    trainer.fit(module, loader)
    trainer.fit(
        module, datamodule=InstructionDataModule(rows, val_split=0.1, student=student, teacher=teacher)
    )
    for step in windows(loader, 4):
        for number, batch in enumerate(step):
            module.training_step(batch, number).backward()  # type: ignore[no-untyped-call]
    module.student.save_pretrained(out)
    again: WithPenalty = WithPenalty.load_from_checkpoint(out / "last.ckpt", student=student)
    model, tokenizer = load_student(str(out))
    model.resize_token_embeddings(len(tokenizer))
    dl.export_student(again.student, tokenizer, out)
    specs = dl.StudentSpec("demo", lora=dl.LoraSpec(rank=4)), dl.TeacherSpec("demo")
    dl.DistillationModule(specs[0], [Smoothed()], [specs[1]], on_policy=dl.OnPolicySettings())
