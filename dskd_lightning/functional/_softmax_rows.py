"""A few rows of one head's logits and their softmax, with as few exponentials as can be."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Scaling", "Scratch", "SoftmaxRows", "row_max"]

Scaling = tuple[float, float | None]
"""``(scale, softcap)`` of a head."""

_BLOCK = 256


class Scratch:
    """Buffers that tiles of one pass use one after the other: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor) -> Tensor:
        """An uninitialised tensor of ``like``'s shape, in float32 or float64; valid until asked for again."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < like.numel():
            dtype = torch.promote_types(like.dtype, torch.float32)
            buffer = self._buffers[name] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return buffer[: like.numel()].view(like.shape)


class SoftmaxRows:
    """Some rows of one head, and what is read off their softmax.

    The exponential is the one operation that costs several times a pass over the rows, so that
    those at temperature 2 are squared for temperature 1.

    Args:
        products: ``[rows, vocab]``, hidden states times head weight plus bias. Overwritten by
            :meth:`write` and, if in float32, before.
        scaling: ``(scale, softcap)`` of the head.
        masked: whether logits may be -inf.
        scratch: buffers to work in.
        name: tells this head's buffers from the other's.
    """

    def __init__(self, products: Tensor, scaling: Scaling, masked: bool, scratch: Scratch, name: str) -> None:
        self.products, self.masked = products, masked
        self._buffer = lambda part: scratch(f"{name}.{part}", products)
        self.scale, softcap = scaling
        self.slope: Tensor | None = None
        wide = products.dtype in (torch.float32, torch.float64)
        logits = products if wide else self._buffer("logits").copy_(products)
        if self.scale != 1.0:
            logits = logits * self.scale
        if softcap is not None:
            squashed = torch.tanh(logits / softcap)
            logits, self.slope = squashed * softcap, 1 - squashed.square()
        top, self.choice = row_max(logits)
        if masked:
            top = top.clamp(min=torch.finfo(top.dtype).min)
        self.logits = logits.sub_(top.unsqueeze(-1))
        self._exponentials: Tensor | None = None
        self._total: Tensor | None = None

    @property
    def exponentials(self) -> Tensor:
        """``[rows, vocab]``, of the logits less their maximum."""
        if self._exponentials is None:
            self._exponentials = torch.exp(self.logits, out=self._buffer("exp"))
        return self._exponentials

    @property
    def total(self) -> Tensor:
        """``[rows]``, sum of the exponentials."""
        if self._total is None:
            self._total = self.exponentials.sum(-1)
        return self._total

    def at(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities and probabilities ``[rows, vocab]``, to be overwritten."""
        logits = torch.mul(self.logits, 1 / temperature, out=self._buffer("warm logits"))
        exponentials = torch.exp(logits, out=self._buffer("warm exp"))
        if temperature == 1.0:
            self._exponentials = self._buffer("exp").copy_(exponentials)
        elif temperature == 2.0:
            self._exponentials = torch.mul(exponentials, exponentials, out=self._buffer("exp"))
        total = exponentials.sum(-1, keepdim=True)
        return logits.sub_(total.log()), exponentials.mul_(total.reciprocal())

    def entropy(self) -> Tensor:
        """``[rows]``, nats."""
        logits = self.logits
        if self.masked:
            logits = logits.masked_fill(logits.isneginf(), 0.0)
        products = torch.mul(self.exponentials, logits, out=self._buffer("product"))
        return self.total.log() - products.sum(-1) / self.total

    def cross_entropy(self, labels: Tensor) -> Tensor:
        """Sum over the rows whose label isn't negative."""
        chosen = self.logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (self.total.log() - chosen).where(labels >= 0, 0.0).sum()

    def cross_entropy_grad(self, labels: Tensor, weight: float | Tensor) -> Tensor:
        """``weight`` times the gradient of :meth:`cross_entropy`; uses the exponentials up."""
        factor = (labels >= 0).to(self.logits.dtype) * weight
        gradient = self.exponentials.mul_((factor / self.total).unsqueeze(-1))
        self._exponentials = self._total = None
        return gradient.scatter_add_(-1, labels.clamp(min=0).unsqueeze(-1), -factor.unsqueeze(-1))

    def write(self, gradient: Tensor | None) -> None:
        """Overwrite the products by the gradient to them, given that to the logits (or to a prefix)."""
        if gradient is None:
            self.products.zero_()
            return
        width = gradient.shape[1]
        if self.slope is not None:
            gradient = gradient * self.slope[:, :width]
        if self.scale != 1.0:
            gradient = gradient * self.scale
        self.products[:, width:] = 0
        self.products[:, :width] = gradient


def row_max(values: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and its first index per row of ``[rows, vocab]``.

    On a CPU the reduction that also tracks the index isn't vectorised: find the block first.
    """
    vocab = values.shape[1]
    if values.device.type != "cpu" or vocab < 4 * _BLOCK:
        top, index = values.max(-1)
        return top, index
    whole = vocab // _BLOCK * _BLOCK
    blocks = values[:, :whole].unflatten(1, (-1, _BLOCK)).amax(-1)
    if whole < vocab:
        blocks = torch.cat([blocks, values[:, whole:].amax(-1, keepdim=True)], dim=1)
    start = blocks.argmax(-1, keepdim=True) * _BLOCK
    index = (start + torch.arange(_BLOCK, device=values.device)).clamp_(max=vocab - 1)
    top, inner = values.gather(1, index).max(-1)
    return top, index.gather(1, inner.unsqueeze(-1)).squeeze(-1)
