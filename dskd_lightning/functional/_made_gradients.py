"""Gradients that a forward pass has made already, kept for the backward pass to scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["save_gradients", "scaled_gradients"]


def save_gradients(ctx: Any, gradients: Sequence[Tensor | None]) -> None:
    """Keep the gradients of a scalar to each input, None where there is none."""
    ctx.positions = [index for index, gradient in enumerate(gradients) if gradient is not None]
    ctx.length = len(gradients)
    ctx.save_for_backward(*(gradients[index] for index in ctx.positions))


def scaled_gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """What was kept, times the gradient to the scalar."""
    gradients: list[Tensor | None] = [None] * ctx.length
    for index, gradient in zip(ctx.positions, ctx.saved_tensors, strict=True):
        gradients[index] = gradient * upstream.to(gradient.dtype)
    return gradients
