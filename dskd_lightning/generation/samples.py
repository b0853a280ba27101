"""Responses that a model samples for itself to learn from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dskd_lightning.generation.generator import GenerationSettings, Generator

__all__ = ["GeneratorSampler", "ResponseSampler", "Sample", "repetition", "sample_key"]


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Args:
        ids: its tokens, without the one that ended it.
        stop: the token that ended it; None where it ran to the limit.
    """

    ids: tuple[int, ...]
    stop: int | None = None


@runtime_checkable
class ResponseSampler(Protocol):
    """Where samples come from; a serving engine takes the place of `GeneratorSampler` by this protocol."""

    def __call__(
        self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], keys: Sequence[int], seed: int
    ) -> list[Sample]:
        """One sample for each of ``prompts``, which all belong to one buffer.

        Args:
            model: the present student, whose weights an engine of its own must take over first.
            tokenizer: the student's.
            prompts: token ids.
            keys: of each prompt with its optimiser step; the random numbers depend on it and the seed
                alone, never on the rank or the rest of the prompts.
            seed: of the run.
        """
        ...


@dataclass(frozen=True)
class GeneratorSampler:
    """Samples with transformers' generation: a key-value cache, batches by length.

    Args:
        temperature: divides the logits.
        top_p: probability that the sampled tokens must hold; 1 samples from all.
        max_new_tokens: most tokens of a response.
        batch_size: most prompts at once.
        batch_tokens: most tokens in the key-value cache at once.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    batch_size: int = 256
    batch_tokens: int = 65536

    def __call__(
        self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], keys: Sequence[int], seed: int
    ) -> list[Sample]:
        """See `ResponseSampler`."""
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        settings = GenerationSettings(
            max_new_tokens=self.max_new_tokens,
            max_length=positions,
            temperature=self.temperature,
            top_p=self.top_p,
            batch_size=self.batch_size,
            batch_tokens=self.batch_tokens,
        )
        found: dict[int, Sample] = {}
        for batch in Generator(model, tokenizer, settings)(prompts, seed=seed, indices=keys):
            found |= {g.index: Sample(g.ids, g.stop) for g in batch}
        return [found[key] for key in keys]


def sample_key(prompt: Sequence[int], step: int, number: int) -> int:
    """What a sample's random numbers depend on: its prompt, the optimiser step, which of several it is."""
    content = np.asarray([step, number, *prompt], np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def repetition(samples: Iterable[Sample], size: int) -> tuple[int, int]:
    """How many of the runs of ``size`` tokens stand in the same sample before, and how many there are."""
    repeated = total = 0
    for sample in samples:
        runs = [sample.ids[at : at + size] for at in range(len(sample.ids) - size + 1)]
        repeated += len(runs) - len(set(runs))
        total += len(runs)
    return repeated, total
