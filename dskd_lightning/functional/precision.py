"""Which types products with a head and the losses on their results run in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast_to", "float64_place", "has_sparse", "summable", "wide", "widest"]


def autocast_to(tensor: Tensor) -> Tensor:
    """``tensor`` in the dtype of its products under autocast; itself outside it or in float64.

    Cast once in front of many chunks, it isn't cast in each.
    """
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def widest(device: torch.device) -> torch.dtype:
    """The widest type that ``device`` can sum in: float64, or float32 where it has no float64."""
    try:
        torch.empty((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # a Mac's GPU
        return torch.float32
    return torch.float64


def summable(values: Tensor) -> Tensor:
    """``values`` in the type that sums of many of them run in."""
    return values.to(widest(values.device))


def float64_place(device: torch.device) -> torch.device:
    """``device``, or the CPU in its stead for what float32 isn't good enough for."""
    return device if widest(device) == torch.float64 else torch.device("cpu")


def has_sparse(device: torch.device) -> bool:
    """Whether ``device`` has sparse tensors; a Mac's GPU has none."""
    try:
        torch.empty(1, 1, layout=torch.sparse_coo, device=device)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def wide(logits: Tensor) -> Tensor:
    """``logits`` in float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()
