"""Which types products with a head and the losses on their results run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_to", "cast_once", "float64_place", "has_sparse", "summable", "wide", "widest"]

_casts: dict[tuple[object, ...], tuple[Tensor, Tensor]] | None = None


@contextmanager
def cast_once() -> Iterator[None]:
    """Several losses share the casts of the heads that they read; nothing may change a head meanwhile."""
    global _casts
    outer = _casts
    _casts = {} if outer is None else outer
    try:
        yield
    finally:
        _casts = outer


def autocast_to(tensor: Tensor) -> Tensor:
    """``tensor`` in the dtype of its products under autocast; itself outside it or in float64.

    Cast once in front of many chunks, it isn't cast in each; see also `cast_once`.
    """
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    dtype = torch.get_autocast_dtype(device)
    if _casts is None or tensor.dtype == dtype:
        return tensor.to(dtype)
    # Detached aliases are other objects at the same place, which the tensor that is kept holds.
    key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, dtype)
    if key not in _casts:
        _casts[key] = tensor, tensor.detach().to(dtype)
    cast: Tensor = _Cast.apply(tensor, _casts[key][1])
    return cast


class _Cast(torch.autograd.Function):
    """A tensor whose cast is there already."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = tensor.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0].to(ctx.dtype), None


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
