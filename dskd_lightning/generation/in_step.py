"""Forward passes of a sharded model, which all ranks make together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dskd_lightning.ranks import rank_and_world, sum_over_ranks

__all__ = ["in_step", "is_sharded"]


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks share the weights, so that each forward pass gathers them."""
    return rank_and_world()[1] > 1 and any(isinstance(part, FSDPModule) for part in model.modules())


@contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """Let each rank run ``model`` as often as it likes, which all of them enter.

    A rank that is through runs it on one token, for the layers' sake, until all others are through. Other
    models are left alone.
    """
    if not is_sharded(model):
        yield
        return
    network: Any = getattr(model, "get_base_model", lambda: model)()  # of peft
    token = torch.zeros((1, 1), dtype=torch.long, device=network.device)

    def running(count: int) -> torch.Tensor:
        return sum_over_ranks(torch.full((), count, device=token.device))

    def announce(*_: Any) -> None:
        running(1)

    hook = network.register_forward_pre_hook(announce)
    try:
        yield
    finally:
        hook.remove()
    while running(0):
        with torch.no_grad():
            network(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
