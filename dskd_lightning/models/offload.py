"""A frozen model whose layers stay in the host's memory and visit the device one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dskd_lightning.models.output import decoder_layers

__all__ = ["offload_layers"]

_Store = dict[str, Any]  # parameters or buffers of one module, by name


class _AtHome(nn.Module):
    """Mixin of a layer that the model's moves to a device leave where it is; its type follows them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def stay(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).dtype)

        return super()._apply(stay, recurse)


def offload_layers(model: nn.Module) -> None:
    """Keep the decoder's layers on the CPU, wherever the model goes; each is on the device while it runs.

    Embeddings, final norm and head move with the model. The layers are copied from page-locked memory, so
    that the host needn't wait, and forgotten behind their forward pass: the device holds one at a time.
    Nothing is kept for a backward pass, so the model must be frozen.

    Args:
        model: a transformers model, on the CPU.
    """
    for layer in decoder_layers(model):  # type: ignore[arg-type]
        kind = type(layer)
        layer.__class__ = type(kind.__name__, (_AtHome, kind), {"__module__": kind.__module__})
        visit = _Visit()
        layer.register_forward_pre_hook(visit.begin, with_kwargs=True)
        layer.register_forward_hook(visit.end, always_call=True)


class _Visit:
    """Of one layer to the device that its input is on."""

    def __init__(self) -> None:
        self._home: list[tuple[_Store, _Store]] = []

    def begin(self, layer: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        device = next(v.device for v in (*inputs, *named.values()) if isinstance(v, Tensor))
        if device.type == "cpu":
            return
        for store in _stores(layer):
            self._home.append((store, dict(store)))
            for name, tensor in store.items():
                if tensor is not None:
                    _lock(tensor, device)
                    store[name] = tensor.detach().to(device, non_blocking=True)

    def end(self, *_: Any) -> None:
        for store, at_rest in self._home:
            store.update(at_rest)
        self._home = []


def _stores(layer: nn.Module) -> Iterator[_Store]:
    for module in layer.modules():
        yield module._parameters
        yield module._buffers


def _lock(tensor: Tensor, device: torch.device) -> None:
    """Page-lock a tensor of the host at its first visit to a GPU."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor.data = tensor.data.pin_memory()
