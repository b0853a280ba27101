"""`DSKDObjective` in a foreign LightningModule: ``python tests/reuse_in_own_module.py STUDENT TEACHER``."""

import sys

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd_lightning import (
    DistillationBatch,
    DistillationCollator,
    DSKDObjective,
    Loaded,
    Side,
    TokenBatch,
    WholeSteps,
    mean_over_step,
)
from dskd_lightning.models.output import decoder_hidden, model_space, side


class Mine(L.LightningModule):
    """With accumulation and on several ranks, too, a step's loss is the mean over all its response tokens."""

    def __init__(self, student: Loaded, teacher: Loaded) -> None:
        super().__init__()
        self.student, self.teacher = student.model.train(), teacher.model.requires_grad_(False).eval()
        self.objective = DSKDObjective(temperature=2.0)
        spaces = [model_space(loaded.model, loaded.tokenizer) for loaded in (student, teacher)]
        self.objective.configure(*spaces)

    def configure_callbacks(self) -> list[L.Callback]:
        return [WholeSteps(self.objective)]

    def side(self, model: torch.nn.Module, tokens: TokenBatch) -> Side:
        return side(model, decoder_hidden(model, tokens), tokens)

    def training_step(self, batch: DistillationBatch, batch_idx: int) -> torch.Tensor:
        with torch.no_grad():
            teacher = self.side(self.teacher, batch.teachers[0])
        output = self.objective(self.side(self.student, batch.student), teacher, batch.alignments[0])
        return mean_over_step(output.loss, batch, self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


if __name__ == "__main__":
    student, teacher = (
        Loaded(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
        for folder in sys.argv[1:3]
    )
    rows = [{"prompt": f"Count to {n}.", "response": "one two three " * n} for n in range(1, 33)]
    loader = DataLoader(rows, batch_size=2, collate_fn=DistillationCollator(student, teacher))
    L.Trainer(max_epochs=2, accumulate_grad_batches=4).fit(Mine(student, teacher), loader)
