"""Which types products with a head and the losses on their results run in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast_to", "wide"]


def autocast_to(tensor: Tensor) -> Tensor:
    """``tensor`` in the dtype of its products under autocast; itself outside it or in float64.

    Cast once in front of many chunks, it isn't cast in each.
    """
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def wide(logits: Tensor) -> Tensor:
    """``logits`` in float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()
