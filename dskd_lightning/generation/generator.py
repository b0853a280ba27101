"""Batched generation from prompts given as token ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from dskd_lightning.errors import UserError
from dskd_lightning.generation.cast_weights import cast_weights
from dskd_lightning.generation.contiguous_head import contiguous_head
from dskd_lightning.generation.in_step import in_step, is_sharded
from dskd_lightning.generation.sampling import InverseTransformSampling, RowBudget, prompt_uniforms
from dskd_lightning.generation.stop_tokens import stop_token_ids
from dskd_lightning.modes import evaluating

__all__ = ["Generation", "GenerationSettings", "Generator"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are generated; the defaults are the papers' protocol.

    Args:
        max_new_tokens: most tokens of a response.
        max_length: most tokens of prompt and response together; None sets no such limit.
        temperature: divides the logits when sampling.
        top_p: probability that the sampled tokens must hold; 1 samples from all.
        batch_size: most prompts generated at once.
        batch_tokens: most tokens in the key-value cache at once: prompts of a batch times the
            longest prompt with its response.
    """

    max_new_tokens: int = 512
    max_length: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 32
    batch_tokens: int = 32768

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "temperature", "batch_size", "batch_tokens"):
            if getattr(self, name) <= 0:
                raise UserError(f"generation: {name} must be positive, not {getattr(self, name)}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"generation: top_p must be in (0, 1], not {self.top_p}.")


@dataclass  # not frozen: `Trainer.predict` sets the fields of what `predict_step` returns
class Generation:
    """One response.

    Args:
        index: of its prompt.
        text: without special tokens.
        ids: its tokens, without the one that ended it.
        stop: the token that ended it; None where it ran to the limit.
    """

    index: int
    text: str
    ids: tuple[int, ...]
    stop: int | None

    @property
    def tokens(self) -> int:
        """Number of tokens, without the one that ended it."""
        return len(self.ids)

    @property
    def finished(self) -> bool:
        """Whether it ended by itself."""
        return self.stop is not None


class Generator:
    """Generates with one model; a prompt's result is the same in every batch (up to rounding).

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer.
        settings: lengths, sampling and batching.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSettings | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings or GenerationSettings()
        self.stop_ids = stop_token_ids(model, tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_id = int(pad if pad is not None else next(iter(self.stop_ids), 0))

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[list[Generation]]:
        """Yield the responses batch by batch, longest prompts first.

        With a sharded model all ranks call this together, each with prompts of its own or with none.

        Args:
            prompts: token ids of each prompt.
            seed: samples with this seed; None decodes greedily.
            indices: the prompts' positions in their dataset, which the random numbers depend on.
            progress: called with (prompts done, prompts in all) after each batch.

        Raises:
            UserError: a prompt is empty or leaves no room for a response.
        """
        indices = range(len(prompts)) if indices is None else indices
        budgets = [self._budget(prompt, index) for prompt, index in zip(prompts, indices, strict=True)]
        done = 0
        with in_step(self.model):
            for batch in self._batches([len(prompt) for prompt in prompts]):
                generations = self._generate(
                    [prompts[i] for i in batch],
                    [budgets[i] for i in batch],
                    [indices[i] for i in batch],
                    seed,
                )
                done += len(batch)
                yield generations
                if progress is not None:
                    progress(done, len(prompts))

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
    ) -> list[Generation]:
        """All responses in the order of the prompts; arguments and errors as for a call."""
        found = [generation for batch in self(prompts, seed=seed, indices=indices) for generation in batch]
        order = _longest_first([len(prompt) for prompt in prompts])
        return [
            generation for _, generation in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])
        ]

    def stream(
        self, prompt: Sequence[int], told: Callable[[str], None], *, seed: int | None = None, index: int = 0
    ) -> Generation:
        """The response to one prompt, told while it is written.

        Args:
            prompt: token ids.
            told: called with the text so far after each token.
            seed: samples with this seed; None decodes greedily.
            index: what the random numbers depend on besides.

        Raises:
            UserError: the prompt is empty or leaves no room for a response.
        """
        budget = self._budget(prompt, index)
        streamer = _Streamer(lambda ids: told(self._trim(ids, budget, index).text))
        return self._generate_once([prompt], [budget], [index], seed, streamer)[0]

    def _budget(self, prompt: Sequence[int], index: int) -> int:
        if not len(prompt):
            raise UserError(f"prompt {index} has no tokens; give it some text or a template.")
        budget = self.settings.max_new_tokens
        if self.settings.max_length is not None:
            budget = min(budget, self.settings.max_length - len(prompt))
        if budget <= 0:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, which leaves no room for a response within "
                f"max_length {self.settings.max_length}; shorten prompts or raise max_length."
            )
        return budget

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        order = _longest_first(lengths)
        while order:
            longest = lengths[order[0]] + self.settings.max_new_tokens
            size = max(1, min(self.settings.batch_size, self.settings.batch_tokens // longest))
            yield order[:size]
            order = order[size:]

    def _generate(
        self, prompts: list[Sequence[int]], budgets: list[int], indices: list[int], seed: int | None
    ) -> list[Generation]:
        try:
            return self._generate_once(prompts, budgets, indices, seed)
        except torch.OutOfMemoryError:
            if len(prompts) == 1 or is_sharded(self.model):  # other ranks are within this forward pass
                raise
        half = len(prompts) // 2
        logger.warning("out of memory with %d prompts at once: going on with %d", len(prompts), half)
        torch.cuda.empty_cache()
        parts = slice(None, half), slice(half, None)
        return [
            g for part in parts for g in self._generate(prompts[part], budgets[part], indices[part], seed)
        ]

    @torch.no_grad()  # not inference mode: a shard gathered here may still be there in training
    def _generate_once(
        self,
        prompts: list[Sequence[int]],
        budgets: list[int],
        indices: list[int],
        seed: int | None,
        streamer: BaseStreamer | None = None,
    ) -> list[Generation]:
        length, most = max(map(len, prompts)), max(budgets)
        device: Any = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([[self.pad_id] * (length - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
        processors = LogitsProcessorList()
        if seed is not None:
            uniforms = torch.stack([prompt_uniforms(seed, index, most) for index in indices]).float()
            settings = self.settings
            processors.append(
                InverseTransformSampling(uniforms, length, settings.temperature, settings.top_p)
            )
        generate: Any = self.model.generate
        with evaluating(self.model), cast_weights(self.model), contiguous_head(self.model):
            output = generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._config(most),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([RowBudget(budgets, length)]),
                streamer=streamer,
            )
        responses = output[:, length:].tolist()
        return [self._trim(*row) for row in zip(responses, budgets, indices, strict=True)]

    def _trim(self, response: list[int], budget: int, index: int) -> Generation:
        response = response[:budget]
        end = next((at for at, token in enumerate(response) if token in self.stop_ids), None)
        kept = response[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Generation(index, str(text), tuple(kept), None if end is None else response[end])

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        # What is not set here comes from the model's own generation config, penalties included.
        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_new_tokens=0,  # wins over the model's own min_length
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stop_ids or None,
            pad_token_id=self.pad_id,
            use_cache=True,
        )


class _Streamer(BaseStreamer):
    """Calls back with the ids of the response so far."""

    def __init__(self, told: Callable[[list[int]], None]) -> None:
        self._told, self._ids, self._prompt = told, list[int](), True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:  # comes first
            self._prompt = False
            return
        self._ids += value.flatten().tolist()
        self._told(self._ids)

    def end(self) -> None:
        """Nothing more comes."""


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])
