"""The processes of a distributed run; one process where there is none."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["barrier", "gathered", "rank_and_world", "sum_over_ranks", "whole"]


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, ``(0, 1)`` outside a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier() -> None:
    """Wait until all processes are here; nothing where there is one alone."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in place; they lie on the device that the processes talk through.

    Lightning's own reductions wait for a barrier first, which stops the host until its GPU has caught up.
    """
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def gathered(value: Any) -> list[Any]:
    """Every process's value (anything that can be pickled), in the order of their numbers."""
    world = rank_and_world()[1]
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; where it is, all processes ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
