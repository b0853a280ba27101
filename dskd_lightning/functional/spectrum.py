"""How many dimensions of a matrix are in use."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_rank", "singular_values"]


def singular_values(weight: Tensor) -> Tensor:
    """Singular values of a projector's weight, descending, float32 on the CPU."""
    return torch.linalg.svdvals(weight.detach().float().cpu())


def effective_rank(weight: Tensor) -> Tensor:
    """``exp`` of the entropy of the normalised singular values; near 1 means a collapsed projector."""
    values = singular_values(weight)
    shares = values / values.sum().clamp(min=1e-12)  # a weight of zeros has collapsed, too
    return torch.exp(-torch.special.xlogy(shares, shares).sum())
