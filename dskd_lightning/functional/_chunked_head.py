"""A head's logits chunk by chunk, and the gradients that come back through it."""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_lightning.functional.precision import autocast_to

__all__ = ["ChunkedHead"]

_WORDS = 2**13
"""Rows of a weight's gradient whose products in half precision are there at once."""


class ChunkedHead:
    """Products of hidden states with one head, and gradients to what needs one.

    Under autocast the products run in its dtype, the weight being cast once for all chunks.

    Args:
        hidden: ``[tokens, hidden]``.
        weight: ``[vocab, hidden]``.
        bias: ``[vocab]`` or None.
        needs: whether ``hidden``, ``weight`` and ``bias`` need a gradient.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> None:
        self.hidden, self.weight = hidden, autocast_to(weight)
        self.bias = None if bias is None else autocast_to(bias)
        self.needs = any(needs)
        self._dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        self._needs_weight, self._needs_bias = needs[1], needs[2] and bias is not None
        self.d_hidden = torch.zeros_like(hidden) if needs[0] else None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None

    def logits(self, span: slice) -> Tensor:
        """``[chunk, vocab]`` in the dtype of the products, before scale and softcap."""
        return torch.nn.functional.linear(self.hidden[span].to(self.weight.dtype), self.weight, self.bias)

    def backward(self, span: slice, gradient: Tensor) -> None:
        """Take in the gradient to the logits of one chunk."""
        if self.d_hidden is not None:
            self.d_hidden[span] = gradient @ self.weight
        if self._needs_weight:
            rows = self.hidden[span].to(self.weight.dtype)
            if self._dtypes[1] == torch.float32 != rows.dtype:
                if self.d_weight is None:
                    self.d_weight = torch.zeros_like(self.weight, dtype=torch.float32)
                for some, words in zip(gradient.split(_WORDS, 1), self.d_weight.split(_WORDS), strict=True):
                    words.add_(some.T @ rows)
            elif self.d_weight is None:
                self.d_weight = gradient.T @ rows
            elif self.d_weight.dtype == rows.dtype == torch.promote_types(rows.dtype, torch.float32):
                self.d_weight.addmm_(gradient.T, rows)
            else:
                # Many chunks' small contributions drown in a half-precision accumulator.
                self.d_weight = self.d_weight.float().add_(gradient.T @ rows)
        if self._needs_bias:
            total = gradient.sum(0, dtype=torch.promote_types(gradient.dtype, torch.float32))
            self.d_bias = total if self.d_bias is None else self.d_bias.add_(total)

    def gradients(self) -> list[Tensor | None]:
        """To hidden states, weight and bias, in their dtypes; None where none is needed."""
        return [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip((self.d_hidden, self.d_weight, self.d_bias), self._dtypes, strict=True)
        ]
