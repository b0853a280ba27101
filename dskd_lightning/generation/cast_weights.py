"""Weights in the type that autocast computes in, for as long as a model writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["cast_weights"]


@contextmanager
def cast_weights(model: nn.Module) -> Iterator[None]:
    """Linear layers hold what autocast would make of their weights, which then isn't made for every token.

    Autocast keeps the casts of weights that are trained, under one context alone, and never those of frozen
    ones. Results are the same, bit for bit. The weights are the model's own again afterwards; until then
    those of its linear layers take half as much memory once more. Shards, compiled models, and layers
    whose weights are elsewhere than the model's embeddings (see `offload`) are left as they are.

    Args:
        model: whose weights nobody changes meanwhile.
    """
    own = [(module, module.weight, module.bias) for module in _linear(model)]
    try:
        for module, weight, bias in own:
            dtype = torch.get_autocast_dtype(weight.device.type)
            module.weight = _cast(weight, dtype)
            module.bias = None if bias is None else _cast(bias, dtype)
        yield
    finally:
        for module, weight, bias in own:
            module.weight, module.bias = weight, bias


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
        and _is_whole(module)
        and module.weight.dtype == torch.float32
        and module.weight.device == first.device
    ]


def _is_whole(module: nn.Linear) -> bool:
    """Whether the weight is an ordinary one: no shard of it, no placeholder, nothing quantised."""
    shape = (module.out_features, module.in_features)
    return type(module.weight) is nn.Parameter and module.weight.shape == shape


def _cast(weight: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(dtype), requires_grad=False)
