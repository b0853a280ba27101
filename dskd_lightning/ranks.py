"""The processes of a distributed run; one process where there is none."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

__all__ = ["barrier", "gathered", "rank_and_world"]


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, ``(0, 1)`` outside a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier() -> None:
    """Wait until all processes are here; nothing where there is one alone."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def gathered(value: Any) -> list[Any]:
    """What each process passed, in the order of their numbers; all must call."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values
