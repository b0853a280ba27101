"""Learning from responses that the student samples itself (METHODS, "On-policy distillation")."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.generation.samples import GeneratorSampler, ResponseSampler, Sample, sample_key
from dskd_lightning.objectives.base import ObjectiveOutput
from dskd_lightning.structures import SAMPLE_STATISTICS, DistillationBatch, Ratio, Side
from dskd_lightning.training.fidelity import likelihood

__all__ = ["OnPolicySettings", "SampleBuffer", "on_samples", "sample_metrics"]

logger = logging.getLogger(__name__)

_Samples = list[list[list[Sample]]]
"""Of one optimiser step: per micro-batch, per example, several."""


@dataclass
class OnPolicySettings:
    """Which optimiser steps learn from the student's own samples, and how those are drawn.

    On samples the teacher's term alone is the loss, whatever the objective's ``kd_ratio``.

    Args:
        fraction: of the optimiser steps; several numbers are taken one after another at even distances
            over training, with straight lines between them: ``[0, 0, 1]`` begins in the middle.
        temperature: divides the logits when sampling.
        top_p: probability that the sampled tokens must hold; 1 samples from all.
        max_new_tokens: most tokens of a sample.
        buffer_steps: optimiser steps that are sampled for at once, in large batches: samples are at most
            one step less old.
        samples_per_prompt: responses to each prompt; they multiply the rows of a batch.
        batch_tokens: most tokens in the key-value cache at once.
        sampler: draws instead of transformers' generation, which the settings of sampling above are for.
    """

    fraction: float | list[float] = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    buffer_steps: int = 16
    samples_per_prompt: int = 1
    batch_tokens: int = 65536
    sampler: ResponseSampler | None = None

    def check(self) -> None:
        """Raise `UserError` where a value is out of range; called by the module, not before."""
        if not self.fractions or not all(0 <= value <= 1 for value in self.fractions):
            raise UserError(
                f"model.on_policy.fraction: {self.fraction} must be a number from 0 to 1, or a list of such."
            )
        for name in ("temperature", "max_new_tokens", "buffer_steps", "samples_per_prompt", "batch_tokens"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.on_policy.{name}: {getattr(self, name)} must be positive.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"model.on_policy.top_p: {self.top_p} must be in (0, 1].")

    @property
    def fractions(self) -> list[float]:
        """What ``fraction`` goes through."""
        return self.fraction if isinstance(self.fraction, list) else [self.fraction]

    @property
    def changes(self) -> bool:
        """Whether the fraction depends on how much of training is done."""
        return len(set(self.fractions)) > 1

    def samples_at(self, step: int, steps: float, seed: int) -> bool:
        """Whether an optimiser step learns from samples: the same on all ranks.

        Args:
            step: counts from 0.
            steps: of the whole training; read where ``fraction`` changes.
            seed: of the run.
        """
        done = step / max(steps - 1, 1) if self.changes else 0.0
        fraction = np.interp(min(done, 1.0), np.linspace(0, 1, len(self.fractions)), self.fractions)
        return bool(np.random.default_rng([seed, step, 0x5A]).random() < fraction)

    def make_sampler(self) -> ResponseSampler:
        """The one given, or transformers' generation with these settings."""
        return self.sampler or GeneratorSampler(
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
            batch_tokens=self.batch_tokens,
        )


class Substitution(Protocol):
    """Makes the batch that learns from samples, see `dskd_lightning.data.samples.BatchOfSamples`."""

    def __call__(
        self, batch: DistillationBatch, samples: Sequence[Sequence[Sample]]
    ) -> DistillationBatch: ...


class SampleBuffer:
    """Samples for several optimiser steps at once, and puts them in the place of their batches.

    Its state belongs in a checkpoint: a run that goes on in the middle of it learns from the same samples.

    Args:
        settings: which steps, and how.
        prompts: of a batch, per example.
        substitute: puts samples into a batch.
        draw: samples for prompts and their keys, with the present student.
        seed: of the run.
    """

    def __init__(
        self,
        settings: OnPolicySettings,
        prompts: Callable[[DistillationBatch], list[list[int]]],
        substitute: Substitution,
        draw: Callable[[list[list[int]], list[int]], list[Sample]],
        seed: int = 0,
    ) -> None:
        self.settings, self.seed = settings, seed
        self._prompts, self._substitute, self._draw = prompts, substitute, draw
        self._samples: dict[int, _Samples] = {}
        self._filled_at = 0
        self.seconds = 0.0
        """Spent on drawing so far."""
        self._began: float | None = None

    def replaced(
        self, windows: Iterator[list[DistillationBatch]], step: int, steps: float
    ) -> Iterator[list[DistillationBatch]]:
        """The windows of batches, one per optimiser step, with samples where a step learns from them.

        Args:
            windows: read ahead by up to ``buffer_steps``.
            step: of the first window.
            steps: of the whole training.
        """
        ahead: deque[list[DistillationBatch]] = deque()
        self._began = self._began or time.perf_counter()
        while ahead or (window := next(windows, None)) is not None:
            if not ahead:
                ahead.append(window)  # type: ignore[arg-type]
            if not self.settings.samples_at(step, steps, self.seed):
                yield ahead.popleft()
            else:
                if step not in self._samples:
                    while (
                        len(ahead) < self.settings.buffer_steps
                        and (window := next(windows, None)) is not None
                    ):
                        ahead.append(window)
                    self._fill(ahead, step, steps)
                pairs = zip(ahead.popleft(), self._samples[step], strict=True)
                yield [self._substitute(batch, samples) for batch, samples in pairs]
            self._samples.pop(step, None)
            step += 1

    @property
    def time_share(self) -> float:
        """Share of the time since training began here in which samples were drawn."""
        return 0.0 if self._began is None else self.seconds / max(time.perf_counter() - self._began, 1e-9)

    def age(self, step: int) -> int:
        """Optimiser steps since the samples of ``step`` were drawn."""
        return step - self._filled_at

    def state_dict(self) -> dict[str, Any]:
        """The samples that are still to be learnt from, in plain types."""
        kept = {
            step: [[[(list(s.ids), s.stop) for s in several] for several in batch] for batch in window]
            for step, window in self._samples.items()
        }
        return {"filled_at": self._filled_at, "samples": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the samples of `state_dict`."""
        self._filled_at = int(state["filled_at"])
        self._samples = {
            int(step): [
                [[Sample(tuple(ids), stop) for ids, stop in several] for several in b] for b in window
            ]
            for step, window in state["samples"].items()
        }

    def _fill(self, windows: Sequence[list[DistillationBatch]], step: int, steps: float) -> None:
        start, several = time.perf_counter(), range(self.settings.samples_per_prompt)
        due = {
            at: [self._prompts(batch) for batch in window]
            for at, window in enumerate(windows, step)
            if self.settings.samples_at(at, steps, self.seed)
        }
        asked = [
            (prompt, sample_key(prompt, at, number))
            for at, window in due.items()
            for prompts in window
            for prompt in prompts
            for number in several
        ]
        drawn = self._draw([prompt for prompt, _ in asked], [key for _, key in asked])
        self._complain(drawn)
        found = iter(drawn)
        for at, window in due.items():
            self._samples[at] = [[[next(found) for _ in several] for _ in prompts] for prompts in window]
        self._filled_at = step
        self.seconds += time.perf_counter() - start

    def _complain(self, samples: Sequence[Sample]) -> None:
        if len(samples) >= 8 and not any(sample.ids for sample in samples):
            raise UserError(
                f"model.on_policy: all {len(samples)} samples are empty, which teach nothing: "
                "fine-tune it first (`--model.weights_from` takes the result), or lower `fraction`."
            )
        if len(samples) >= 8 and not any(sample.stop is not None for sample in samples):
            logger.warning(
                "model.on_policy: none of %d samples ended by itself within max_new_tokens: raise it, or "
                "fine-tune the student first.",
                len(samples),
            )


def on_samples(output: ObjectiveOutput, teacher: Side, response_bytes: Tensor) -> ObjectiveOutput:
    """The output with ``teacher_nll_per_byte``: how likely the teacher finds what the student wrote."""
    with torch.no_grad():
        found = Ratio(likelihood(teacher)["nll"], response_bytes.sum())
    return replace(output, metrics={**output.metrics, "teacher_nll_per_byte": found})


def sample_metrics(batch: DistillationBatch, buffer: SampleBuffer, step: int) -> dict[str, Ratio]:
    """`SAMPLE_STATISTICS` of a batch, the samples' age in steps, and the share of time that drawing took."""
    assert batch.samples is not None
    one = batch.samples.new_ones(())
    metrics = {
        name: Ratio(total, count)
        for name, (total, count) in zip(SAMPLE_STATISTICS, batch.samples.unbind(), strict=True)
    }
    metrics["age"] = Ratio(one.new_full((), buffer.age(step)), one)
    metrics["time_share"] = Ratio(one.new_full((), buffer.time_share), one)
    return metrics
