"""Student and teacher on what the student writes by itself, in validation and test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dskd_lightning.callbacks.tested_model import tested_model
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.on_samples import sample_responses, sampled_batches, sampled_fidelity
from dskd_lightning.generation.samples import GeneratorSampler
from dskd_lightning.ranks import gathered
from dskd_lightning.runs.samples import SampledResponse, write_samples
from dskd_lightning.runs.text import visible
from dskd_lightning.structures import DistillationBatch
from dskd_lightning.training import RatioMeter

if TYPE_CHECKING:
    from dskd_lightning.module import DistillationModule

__all__ = ["SampleFidelity", "agreement_text"]

_STYLES = {"likely": "", "doubtful": "yellow", "unlikely": "red", "unread": "dim"}


class SampleFidelity(L.Callback):
    """Logs ``val/samples_*`` and ``test/samples_*``; shows samples with the teacher's opinion of each piece.

    Of the metrics ``samples_reverse_kl`` says how far the student, left to itself, is from its teacher (in
    nats a token), and ``samples_teacher_nll_per_byte`` how likely the teacher finds what the student
    wrote. Samples are written to ``OUTPUT/samples.json``, which the report shows. Needs a whole teacher: a
    cache holds its states on the dataset's responses.

    Args:
        output: the run folder.
        prompts: how many are sampled for, on all ranks together; 0 turns it off, None takes 32 where the
            student learns from its samples and none elsewhere.
        max_new_tokens: most tokens of a sample.
        temperature: divides the logits when sampling.
        top_p: probability that the sampled tokens must hold.
        seed: of the samples.
        show: samples in the terminal and in the report.
    """

    def __init__(
        self,
        output: str | Path,
        prompts: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 10,
        show: int = 2,
    ) -> None:
        self.output = Path(output)
        self.prompts, self.seed, self.show = prompts, seed, show
        self.sampler = GeneratorSampler(
            temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, batch_size=32
        )

    def validation_metrics(self, module: DistillationModule) -> tuple[str, ...]:
        """What it adds to the validations' metrics."""
        closeness = ("reverse_kl", "kl", "agreement")
        aligned = tuple(f"aligned_{name}" for name in closeness)
        names = (*closeness, *aligned, "teacher_nll_per_byte") if module.teacher_specs else ()
        # Asked before teachers are loaded; with samples in training they will be whole.
        sampled = module.on_policy is not None if self.prompts is None else self.prompts > 0
        return tuple(f"samples_{name}" for name in names) if sampled else ()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(cast("DistillationModule", pl_module))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(cast("DistillationModule", pl_module))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(cast("DistillationModule", pl_module))

    def _check(self, module: DistillationModule) -> None:
        """Before a batch is read, not when an epoch has been trained."""
        if self._count(module) and module.teacher_specs and not module.complete_teachers:
            raise UserError(
                "samples.prompts: a cache holds the teacher's states on the dataset's responses, not on "
                "samples; set data.teacher_cache to null, or samples.prompts to 0."
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._evaluate(trainer, cast("DistillationModule", pl_module), "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate(trainer, cast("DistillationModule", pl_module), "test")

    def _count(self, module: DistillationModule) -> int:
        if self.prompts is not None:
            return self.prompts
        return 32 if module.on_policy is not None and module.complete_teachers else 0

    def _evaluate(self, trainer: L.Trainer, module: DistillationModule, stage: str) -> None:
        count = self._count(module)
        if not count:
            return
        datamodule = cast("Any", trainer).datamodule
        loader = datamodule.val_dataloader() if stage == "val" else datamodule.test_dataloader()
        meter, shown = RatioMeter(), list[SampledResponse]()

        def measure() -> None:
            batches = _first(loader, -(-count // trainer.world_size))
            for batch in sampled_batches(module, batches, self.sampler, self.seed):
                moved = batch.to(module.device)
                meter.update(sampled_fidelity(module, moved))
                if gathered(len(shown) < self.show)[0]:  # the first rank's are shown
                    shown.extend(sample_responses(module, moved, max(0, self.show - len(shown))))

        with torch.no_grad():
            module.as_step(measure)
        ratios = meter.reduce(module._all_reduce)
        values = {f"{stage}/samples_{name}": ratio.value.float() for name, ratio in ratios.items()}
        module.log_dict(values, batch_size=1)
        if trainer.is_global_zero and shown:
            write_samples(self.output / "samples.json", shown, tested_model(self.output, trainer, module))
            Console().print(_table(shown, f"samples at step {trainer.global_step}"))


def _first(loader: Iterable[DistillationBatch], count: int) -> Iterator[DistillationBatch]:
    """Whole batches until ``count`` examples are there: the same number of batches on every rank."""
    left = count
    for batch in loader:
        if left <= 0:
            return
        yield batch
        left -= max(len(batch), 1)


def _table(samples: Iterable[SampledResponse], title: str) -> Table:
    table = Table(title=Text(title), show_lines=True, expand=True)
    table.add_column("prompt", ratio=1, overflow="fold")
    table.add_column(
        Text("the student's sample; ") + Text("doubtful", "yellow") + Text(" and ") + Text("unlikely", "red")
        + Text(" to the teacher"),
        ratio=2,
        overflow="fold",
    )  # fmt: skip
    for sample in samples:
        table.add_row(Text(visible(sample.prompt[-300:])), agreement_text(sample))
    return table


def agreement_text(sample: SampledResponse) -> Text:
    """The sample with each piece coloured by the teacher's probability of it; dim where it has none."""
    text = Text()
    for piece, opinion, _ in sample.opinions():
        text.append(visible(piece).replace("\n", " ⏎ "), _STYLES[opinion])
    return text
