"""Strategies that shard student and teachers."""

from dskd_lightning.strategies.checks import check_strategy, check_strategy_name
from dskd_lightning.strategies.fsdp2 import DSKDModelParallelStrategy, shard

__all__ = ["DSKDModelParallelStrategy", "check_strategy", "check_strategy_name", "shard"]
