"""Sampling whose result for a prompt does not depend on the rest of its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from dskd_lightning.functional.precision import summable

__all__ = ["InverseTransformSampling", "RowBudget", "prompt_uniforms"]


def prompt_uniforms(seed: int, index: int, count: int) -> Tensor:
    """The random numbers of one prompt, ``[count]`` float64 in [0, 1), on the CPU.

    Those of a shorter ``count`` are a prefix of those of a longer one.
    """
    # SplitMix64's increment spreads neighbouring (seed, index) pairs over the generator's seeds.
    mixed = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 1) % 2**63
    generator = torch.Generator().manual_seed(mixed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


class InverseTransformSampling(LogitsProcessor):
    """Picks the token where the cumulative probability passes the prompt's next random number.

    Leaves only the picked token, so that greedy decoding takes it. One number per token, drawn
    beforehand on the CPU: the same on every device and in every batch.

    Args:
        uniforms: ``[rows, max_new_tokens]``.
        prompt_length: tokens of the padded prompts.
        temperature: divides the logits.
        top_p: smallest set of most likely tokens that holds this probability; 1 keeps all.
    """

    def __init__(
        self, uniforms: Tensor, prompt_length: int, temperature: float = 1.0, top_p: float = 1.0
    ) -> None:
        self.uniforms = uniforms
        self.prompt_length = prompt_length
        self.temperature = temperature
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[rows, vocab]`` with all but the picked token at minus infinity."""
        probabilities = torch.softmax(summable(scores) / self.temperature, dim=-1)
        order = None
        if self.top_p < 1.0:
            probabilities, order = probabilities.sort(dim=-1, descending=True)
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        cumulative = probabilities.cumsum(dim=-1)
        uniform = self.uniforms[:, input_ids.shape[1] - self.prompt_length].to(cumulative)
        target = (uniform * cumulative[:, -1]).unsqueeze(-1)
        picked = torch.searchsorted(cumulative, target, right=True).clamp(max=scores.shape[-1] - 1)
        if order is not None:
            picked = order.gather(-1, picked)
        return torch.full_like(scores, -torch.inf).scatter(-1, picked, 0.0)


class RowBudget(StoppingCriteria):
    """Ends each row at its own number of new tokens.

    Args:
        budgets: new tokens allowed to each row.
        prompt_length: tokens of the padded prompts.
    """

    def __init__(self, budgets: Sequence[int], prompt_length: int) -> None:
        self.budgets = torch.tensor(budgets)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: object) -> Tensor:  # type: ignore[override]
        """``[rows]``, true where the budget is spent."""
        return (input_ids.shape[1] - self.prompt_length >= self.budgets).to(input_ids.device)
