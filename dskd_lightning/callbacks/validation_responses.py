"""Generated responses in every validation, scored as in the test."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch

from dskd_lightning.callbacks.prompts import prompt_records
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.metrics import exact_match
from dskd_lightning.evaluation.predict import PromptRecord
from dskd_lightning.evaluation.rouge import rouge_l
from dskd_lightning.functional.precision import widest
from dskd_lightning.generation.generator import GenerationSettings, Generator
from dskd_lightning.ranks import rank_and_world
from dskd_lightning.runs.heartbeat import Progress
from dskd_lightning.runs.validation_metrics import RESPONSES

if TYPE_CHECKING:
    from dskd_lightning.module import DistillationModule

__all__ = ["ValidationResponses"]

METRICS = (*RESPONSES, "response_tokens")
"""ROUGE-L and exact matches in percent, shares of all responses, and their mean length."""


class ValidationResponses(L.Callback):
    """Logs ``val/rougeL`` and its like of responses to validation prompts, by which a run may be chosen.

    The papers choose checkpoints by ROUGE-L of sampled responses: ``prompts`` and ``seeds`` say of how many.
    The same prompt gets the same random numbers in every validation, whatever the batches and ranks, so
    that two checkpoints differ by their weights alone.

    Args:
        prompts: how many validation prompts, the first ones; 0 generates none.
        seeds: sampling seeds, whose mean is logged, with its standard deviation ``val/rougeL_std``; an empty
            list decodes greedily.
        max_new_tokens: most tokens of a response.
        max_length: most tokens of prompt and response together; None sets no such limit.
        temperature: divides the logits when sampling.
        top_p: probability that the sampled tokens must hold.
        batch_size: prompts generated at once.
    """

    def __init__(
        self,
        prompts: int = 0,
        seeds: tuple[int, ...] = (10,),
        max_new_tokens: int = 256,
        max_length: int | None = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = 32,
    ) -> None:
        if prompts < 0:
            raise UserError(f"validation.prompts: {prompts} must be at least 0.")
        self.prompts = prompts
        self.seeds: tuple[int | None, ...] = tuple(seeds) or (None,)
        self.settings = GenerationSettings(
            max_new_tokens=max_new_tokens, max_length=max_length, temperature=temperature, top_p=top_p,
            batch_size=batch_size,
        )  # fmt: skip

    def validation_metrics(self, module: DistillationModule) -> tuple[str, ...]:
        """What it adds to the validations' metrics."""
        return METRICS if self.prompts else ()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self.prompts:
            return
        module = cast("DistillationModule", pl_module)
        datamodule = cast("Any", trainer).datamodule
        records = prompt_records(datamodule, "val", self.prompts, max_length=self.settings.max_length)
        sums = module._all_reduce(module.as_step(lambda: self._sums(module, records)))
        means = (sums / len(records)).tolist()
        values = {
            f"val/{name}": statistics.fmean(seed[place] for seed in means)
            for place, name in enumerate(METRICS)
        }
        if len(means) > 1:
            values["val/rougeL_std"] = statistics.stdev(seed[0] for seed in means)
        module.log_dict(values, batch_size=1)

    def _sums(self, module: DistillationModule, records: list[PromptRecord]) -> torch.Tensor:
        """``[seeds, metrics]`` over this rank's share of the prompts."""
        rank, world = rank_and_world()
        own = records[rank::world]
        generator = Generator(cast("Any", module.student), module.tokenizer, self.settings)
        totals = [[0.0] * len(METRICS) for _ in self.seeds]
        with Progress("Validation responses", len(own) * len(self.seeds), "prompts", seconds=10) as progress:
            for seed, total in zip(self.seeds, totals, strict=True):
                answers = generator(
                    [record.ids for record in own], seed=seed, indices=[record.index for record in own]
                )
                for batch in answers:
                    for answer in batch:
                        references = records[answer.index].references
                        scores = (
                            100 * rouge_l(answer.text, references),
                            100 * exact_match(answer.text, references),
                            not answer.tokens,
                            not answer.finished,
                            answer.tokens,
                        )
                        total[:] = [sum(pair) for pair in zip(total, scores, strict=True)]
                    progress.done += len(batch)
        return torch.tensor(totals, dtype=widest(module.device), device=module.device)
