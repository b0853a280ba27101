"""Heads and losses met in chunks of tokens: no ``[tokens, vocab]`` tensor outlives its chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dskd_lightning.functional.chunking import chunk_tokens, chunked_map, chunked_sum, head_parameters
from dskd_lightning.functional.fused_distillation import FusedLosses, fused_distillation
from dskd_lightning.functional.precision import wide
from dskd_lightning.structures import Head

__all__ = [
    "FusedLosses",
    "chunk_tokens",
    "chunked_map",
    "chunked_sum",
    "fused_distillation",
    "token_argmax",
    "token_log_prob",
]


def token_log_prob(
    hidden: Tensor, head: Head, labels: Tensor, *, temperature: float = 1.0, chunk_size: int | None = None
) -> Tensor:
    """Log-probability of one token per position, differentiable and without stored logits.

    Args:
        hidden: ``[tokens, hidden]``.
        head: the head that reads them; has a gradient where its tensors require one.
        labels: ``[tokens]``, ids in the head's vocabulary.
        temperature: divides the logits.
        chunk_size: tokens per chunk; None takes it from the default memory budget.

    Returns:
        ``[tokens]``, float32 or float64.
    """

    def chunk_log_prob(chunk: tuple[Any, ...], parameters: tuple[Any, ...]) -> Tensor:
        rows, targets = chunk
        logits = wide(replace(head, weight=parameters[0], bias=parameters[1]).logits(rows))
        if temperature != 1.0:
            logits = logits / temperature
        chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return chosen - logits.logsumexp(-1)

    size = chunk_size or chunk_tokens(head.vocab_size, device=hidden.device)
    return chunked_map(chunk_log_prob, (hidden, labels), head_parameters(head), chunk_size=size)


@torch.no_grad()
def token_argmax(hidden: Tensor, head: Head, *, chunk_size: int | None = None) -> Tensor:
    """Most likely token ``[tokens]`` of hidden states ``[tokens, hidden]``, without a gradient."""

    def chunk_argmax(chunk: tuple[Any, ...], parameters: tuple[Any, ...]) -> Tensor:
        return replace(head, weight=parameters[0], bias=parameters[1]).logits(chunk[0]).argmax(-1)

    size = chunk_size or chunk_tokens(head.vocab_size, copies=1, device=hidden.device)
    return chunked_map(chunk_argmax, (hidden,), head_parameters(head), chunk_size=size)
