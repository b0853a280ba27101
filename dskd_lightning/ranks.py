"""The processes of a distributed run; one process where there is none."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["barrier", "rank_and_world"]


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, ``(0, 1)`` outside a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier() -> None:
    """Wait until all processes are here; nothing where there is one alone."""
    if rank_and_world()[1] > 1:
        dist.barrier()
