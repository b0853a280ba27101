"""Strategies that shard student and teachers."""

from dskd_lightning.strategies.fsdp2 import DSKDModelParallelStrategy, shard

__all__ = ["DSKDModelParallelStrategy", "shard"]
