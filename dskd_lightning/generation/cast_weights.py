"""Linear layers that cast their weights once, for as long as a model writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["cast_weights"]


@contextmanager
def cast_weights(model: nn.Module) -> Iterator[None]:
    """Linear layers keep what autocast makes of their weights, which then isn't made for every token.

    Autocast keeps the casts of weights that are trained, under one context alone, and never those of frozen
    ones. Results are the same, bit for bit, and so are the weights: who reads them meanwhile sees their own
    type. What is kept takes half of the memory of the linear layers; where there is no room for it, a layer
    casts for every token. Shards, compiled models, and layers whose weights are elsewhere than the model's
    first (see `offload`) are left as they are.

    Args:
        model: whose weights nobody changes meanwhile.
    """
    layers = _linear(model)
    for layer in layers:
        layer.forward = _with_cast(layer, layer.forward)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _linear(model: nn.Module) -> list[nn.Linear]:
    modules = list(model.modules())
    if any(module._compiled_call_impl is not None for module in modules):  # compiled for its own weights
        return []
    first = next(model.parameters(), None)
    if first is None or not torch.is_autocast_enabled(first.device.type):
        return []
    return [
        module
        for module in modules
        if type(module) is nn.Linear
        and "forward" not in module.__dict__  # which others have replaced
        and _is_whole(module)
        and module.weight.dtype == torch.float32
        and module.weight.device == first.device
    ]


def _is_whole(module: nn.Linear) -> bool:
    """Whether the weight is an ordinary one: no shard of it, no placeholder, nothing quantised."""
    shape = (module.out_features, module.in_features)
    return type(module.weight) is nn.Parameter and module.weight.shape == shape


def _with_cast(layer: nn.Linear, own: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The layer's ``forward``, with a cast that is made when it is needed first."""
    device = layer.weight.device.type
    dtype = torch.get_autocast_dtype(device)
    kept: list[Tensor] = []

    def forward(input: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != dtype:
            return own(input)
        if not kept:
            try:
                kept.extend(_cast(one, dtype) for one in (layer.weight, layer.bias) if one is not None)
            except torch.OutOfMemoryError:
                kept.clear()
                return own(input)
        return F.linear(input, *kept)

    return forward


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype)
