"""What storing hidden states in a smaller type loses."""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_lightning.structures import Head

__all__ = ["StorageError"]


class StorageError:
    """Running means over samples of stored states.

    Attributes:
        tokens: positions measured.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._difference = self._square = self._kl = 0.0

    @torch.inference_mode()
    def update(self, hidden: Tensor, stored: Tensor, head: Head) -> None:
        """Measure ``stored`` against ``hidden``, both ``[n, hidden]``, through ``head``."""
        wide = hidden.double()
        self._difference += float((stored.double() - wide).square().sum())
        self._square += float(wide.square().sum())
        device = head.weight.device
        true, found = (head.logits(h.to(device)).float().log_softmax(-1) for h in (hidden, stored))
        self._kl += float((true.exp() * (true - found)).sum())
        self.tokens += len(hidden)

    @property
    def relative(self) -> float:
        """``||stored - hidden|| / ||hidden||``."""
        return float((self._difference / self._square) ** 0.5) if self._square else 0.0

    @property
    def kl(self) -> float:
        """Mean KL divergence, in nats, of the recomputed teacher from the true one."""
        return self._kl / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        if not self.tokens:
            return "nothing was stored"
        if self._difference == 0:
            return f"exact on {self.tokens} sampled tokens"
        return (
            f"relative error of the hidden states {self.relative:.2e}, mean KL of the recomputed logits "
            f"{max(self.kl, 0.0):.2e} nats, on {self.tokens} sampled tokens"
        )
