"""Generate responses in `test` and `predict`, and score them by the papers' protocol."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from peft import PeftModel

from dskd_lightning.callbacks.prompts import prompt_records
from dskd_lightning.callbacks.tested_model import tested_model
from dskd_lightning.evaluation.efficiency import measure_efficiency
from dskd_lightning.evaluation.metrics import DistinctN, ExactMatch, ResponseLength, RougeL
from dskd_lightning.evaluation.predict import predict, told_by_seed
from dskd_lightning.evaluation.rouge import RecentTexts
from dskd_lightning.files import write_object
from dskd_lightning.generation.generator import GenerationSettings, Generator
from dskd_lightning.models.export import merged
from dskd_lightning.models.fingerprint import weights_fingerprint
from dskd_lightning.models.loaded import Loaded
from dskd_lightning.models.loading import load_teacher
from dskd_lightning.models.sources import resolve_source
from dskd_lightning.runs.environment import collect_environment
from dskd_lightning.runs.heartbeat import Progress
from dskd_lightning.runs.identity import MODEL_KEY
from dskd_lightning.runs.predictions import Prediction

if TYPE_CHECKING:
    from dskd_lightning.module import DistillationModule

__all__ = ["ResponseEvaluation"]

_TOGETHER = 256


class ResponseEvaluation(L.Callback):
    """Writes ``OUTPUT/predictions/*.jsonl`` and logs ROUGE-L, exact match, distinct-n and length.

    An interrupted run goes on where it stopped. The papers' protocol is five seeds, 10 to 50,
    temperature 1, top-p 1, at most 512 tokens of prompt and response; it is the default.

    Args:
        output: the run folder.
        enabled: False scores likelihoods alone.
        seeds: sampling seeds; an empty list decodes greedily.
        max_new_tokens: most tokens of a response.
        max_length: most tokens of prompt and response together; None sets no such limit.
        temperature: divides the logits when sampling.
        top_p: probability that the sampled tokens must hold.
        batch_size: prompts generated at once.
        limit: generate for the first so many prompts only.
        efficiency: after a test, also measure size, speed and energy of the student, its adapter
            merged into a copy, in the type that the trainer's mixed precision computes in.
        teacher_efficiency: and of the first teacher, which is loaded for it where a cache stood in.
    """

    answers_prompts = True  # so that `DistillationModule.predict_step` doesn't

    def __init__(
        self,
        output: str | Path,
        enabled: bool = True,
        seeds: tuple[int, ...] = (10, 20, 30, 40, 50),
        max_new_tokens: int = 512,
        max_length: int | None = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = 32,
        limit: int | None = None,
        efficiency: bool = True,
        teacher_efficiency: bool = False,
    ) -> None:
        self.output = Path(output)
        self.enabled = enabled
        self.seeds: tuple[int | None, ...] = tuple(seeds) or (None,)
        self.limit = limit
        self.efficiency = efficiency
        self.teacher_efficiency = teacher_efficiency
        self._weights: str | None = None
        self.settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
        )

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.enabled:
            pl_module.log_dict(
                {f"test/{k}": v for k, v in self.evaluate(trainer, pl_module, "test").items()}, batch_size=1
            )

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scores = self.evaluate(trainer, pl_module, "predict")
        self._write("predict", scores, self._identity(trainer, pl_module))  # the test's own metrics stay

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {k.removeprefix("test/"): float(v) for k, v in trainer.callback_metrics.items()}
        self._write("metrics", metrics, self._identity(trainer, pl_module))
        module = cast("DistillationModule", pl_module)
        if trainer.world_size > 1:
            return
        if self.efficiency:
            student = _shipped(module.student, str(trainer.precision))
            self._measure(student, "efficiency", model=self._identity(trainer, pl_module))
            del student
        if self.teacher_efficiency and module.teacher_specs:
            spec: Any = module.teacher_specs[0]
            teacher: Any = module.teachers[0] if module.complete_teachers else None
            if teacher is None:
                teacher = load_teacher(spec)
                if not spec.quantization:  # which is on its device already
                    teacher = teacher.to(cast("Any", module.device))
            files: str | Path | None = None
            if not isinstance(spec, Loaded):
                source = resolve_source(spec.source)
                files = source.gguf or (source.location if source.local else None)
            self._measure(teacher, "teacher_efficiency", files)

    def _identity(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        return {**tested_model(self.output, trainer, module), "weights": self._weights}

    def _measure(
        self, network: Any, name: str, files: str | Path | None = None, model: dict[str, Any] | None = None
    ) -> None:
        costs = measure_efficiency(network, folder=files, prompt_tokens=64, new_tokens=32).to_dict()
        named = {} if model is None else {MODEL_KEY: model}
        write_object(self.output / f"{name}.json", {**costs, **named})

    def evaluate(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> dict[str, float]:
        """Generate what is missing and score everything."""
        module_ = cast("DistillationModule", module)
        student: Any = module_.student
        records = prompt_records(
            cast("Any", trainer).datamodule,
            cast("Any", stage),
            self.limit,
            max_length=self.settings.max_length,
        )
        generator = Generator(student, module_.tokenizer, self.settings)
        folder = self.output / "predictions"
        self._weights = weights_fingerprint(student)
        with Progress("Responses", len(records), "prompts", seconds=10) as progress:
            predictions = module_.as_step(
                partial(
                    predict,
                    generator,
                    records,
                    folder,
                    model_id=self._weights,
                    seeds=self.seeds,
                    progress=told_by_seed(progress),
                )
            )
        return response_scores(predictions)

    @rank_zero_only
    def _write(self, name: str, metrics: dict[str, float], model: dict[str, Any]) -> None:
        results = {"environment": collect_environment(), name: {**metrics, MODEL_KEY: model}}
        for file, values in results.items():
            write_object(self.output / f"{file}.json", values)


def _shipped(student: Any, precision: str) -> Any:
    """The student as it is used: its adapter merged, in the type that mixed precision computes in.

    Weights in float32 are the optimiser's need. What is changed is a copy.
    """
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    own: Any
    if isinstance(student, PeftModel):
        own = merged(student)
    elif dtype is None or all(p.dtype == dtype for p in student.parameters() if p.is_floating_point()):
        return student
    else:
        own = copy.deepcopy(student)
    return own if dtype is None else own.to(dtype)


def response_scores(predictions: Mapping[int | None, Iterable[Prediction]]) -> dict[str, float]:
    """Means over seeds of every response metric; ROUGE-L and exact match in percent.

    ``rougeL_std`` is the standard deviation over seeds, where there are several. Some predictions of every
    seed are read at a time; of all of a seed, its distinct n-grams' hashes are kept.
    """
    tokens = RecentTexts()  # the seeds' references are the same
    left = [(_SeedScores(tokens), iter(seed)) for seed in predictions.values()]
    while sum(scores.update(list(itertools.islice(some, _TOGETHER))) for scores, some in left):
        pass  # some of every seed in turn, so that references are still remembered
    by_seed = [scores.compute() for scores, _ in left]
    means = {name: statistics.fmean(scores[name] for scores in by_seed) for name in by_seed[0]}
    if len(by_seed) > 1:
        means["rougeL_std"] = statistics.stdev(scores["rougeL"] for scores in by_seed)
    return means


class _SeedScores:
    """One seed's metrics as its predictions come in."""

    def __init__(self, tokens: RecentTexts) -> None:
        own: dict[str, Any] = {"sync_on_compute": False}  # every rank reads all predictions
        self._judged = {"rougeL": RougeL(tokens, **own), "exact_match": ExactMatch(**own)}
        self._distinct, self._length = DistinctN(2, **own), ResponseLength(**own)

    def update(self, some: Sequence[Prediction]) -> bool:
        """Add predictions; whether there were any."""
        if some:
            texts, references = [p.response for p in some], [p.references for p in some]
            for metric in self._judged.values():
                metric.update(texts, references)
            self._distinct.update(texts)
            self._length.update([p.tokens for p in some], [p.finished for p in some])
        return bool(some)

    def compute(self) -> dict[str, float]:
        values = {**self._judged, "distinct_2": self._distinct}
        scores = {name: float(metric.compute()) for name, metric in values.items()}
        return scores | {name: float(value) for name, value in self._length.compute().items()}
