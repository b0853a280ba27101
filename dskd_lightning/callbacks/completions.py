"""A few prompts answered by teacher and student, side by side, while training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import lightning as L
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from rich.console import Console

from dskd_lightning.callbacks.prompts import prompt_records
from dskd_lightning.evaluation.rouge import rouge_l
from dskd_lightning.generation.generator import GenerationSettings, Generator
from dskd_lightning.runs.tables import CompletionTable

if TYPE_CHECKING:
    from dskd_lightning.module import DistillationModule

__all__ = ["CompletionsTable", "log_completions"]


class CompletionsTable(L.Callback):
    """Prints and logs greedy completions after each validation, and their ROUGE-L as
    ``val/completions_rougeL``.

    The teacher answers once; where training reads its hidden states from a cache and no teacher
    is loaded, the gold responses stand beside the student's.

    Args:
        prompts: how many validation prompts; 0 turns the table off.
        max_new_tokens: most tokens of a completion.
        characters: shown of each text in the terminal.
    """

    def __init__(self, prompts: int = 3, max_new_tokens: int = 64, characters: int = 300) -> None:
        self.prompts = prompts
        self.characters = characters
        self.settings = GenerationSettings(max_new_tokens=max_new_tokens)
        self._teacher: list[str] | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self.prompts:
            return
        module = cast("DistillationModule", pl_module)
        datamodule = cast("Any", trainer).datamodule
        if not hasattr(datamodule, "examples"):
            return  # data of another kind have batches alone
        records = prompt_records(datamodule, "val", self.prompts)
        responses = self._answer(module, module.student, module.tokenizer, [r.ids for r in records])
        columns = {"reference": [r.references[0] if r.references else "" for r in records]}
        if module.complete_teachers:
            if self._teacher is None:
                prompts = prompt_records(datamodule, "val", self.prompts, teacher=0)
                tokenizer = datamodule.teacher_tokenizers[0]
                self._teacher = self._answer(module, module.teachers[0], tokenizer, [r.ids for r in prompts])
            columns = {"teacher": self._teacher}
        scores = [rouge_l(text, r.references) for text, r in zip(responses, records, strict=True)]
        pl_module.log(
            "val/completions_rougeL", sum(scores) / max(1, len(scores)), batch_size=1, sync_dist=True
        )
        if trainer.is_global_zero:
            table = CompletionTable(
                [r.prompt for r in records], {**columns, "student": responses}, self.characters
            )
            Console().print(table.rich(f"completions at step {trainer.global_step}"))
            for logger in trainer.loggers:
                log_completions(logger, table, trainer.global_step)

    def _answer(
        self, module: DistillationModule, model: Any, tokenizer: Any, prompts: list[Any]
    ) -> list[str]:
        generator = Generator(model, tokenizer, self.settings)
        return [answer.text for answer in module.as_step(lambda: generator.answers(prompts))]


def log_completions(logger: Logger, table: CompletionTable, step: int) -> None:
    """Put the table where a logger shows text; other loggers have no place for it."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("completions", table.markdown(), step)
    elif isinstance(logger, WandbLogger):
        logger.log_table("completions", columns=table.headings(), data=table.rows(), step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, table.markdown(), f"completions/step_{step}.md")
