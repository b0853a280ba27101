"""Whether this processor computes in bfloat16, or only emulates it and takes many times as long."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import lightning as L
import torch
from torch.nn.functional import linear

__all__ = ["FLOAT32_CONFIG", "SLOW", "bfloat16_slowdown", "warn_of_slow_bfloat16"]

FLOAT32_CONFIG = "dskd:precision/float32"
SLOW = 1.2
"""From how many times float32's seconds on, bfloat16 is to be left alone; what it saves is memory."""
_TOKENS, _WIDTH, _REPEATS = 128, 512, 5

logger = logging.getLogger(__name__)


@cache
def bfloat16_slowdown() -> float:
    """Seconds of a linear layer in bfloat16 over those in float32 on the CPU, the best of five each.

    Measured once a process, in a few milliseconds; about 0.3 with AMX, 20 and more without AVX-512.
    """
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


@torch.inference_mode()
def _seconds(dtype: torch.dtype) -> float:
    hidden = torch.ones(_TOKENS, _WIDTH, dtype=dtype)
    weight = torch.ones(2 * _WIDTH, _WIDTH, dtype=dtype)
    linear(hidden, weight)  # warm
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        linear(hidden, weight)
        times.append(time.perf_counter() - begin)
    return min(times)


def warn_of_slow_bfloat16(trainer: L.Trainer, specs: Iterable[object]) -> None:
    """Say so, with the remedy, where a Trainer on the CPU or its models would crawl in bfloat16.

    Args:
        trainer: that is about to run.
        specs: of its models; those in memory have no ``dtype`` to change.
    """
    if trainer.strategy.root_device.type != "cpu":
        return
    precision = str(cast("Any", trainer).precision)
    dtypes = [getattr(spec, "dtype", None) for spec in specs]
    if not precision.startswith("bf16") and "bfloat16" not in dtypes:
        return
    if (slowdown := bfloat16_slowdown()) > SLOW:
        logger.warning(
            "This processor takes %.0f times as long in bfloat16 as in float32: lay `--config %s` over "
            "yours, or set trainer.precision to 32-true and the models' dtype to float32.",
            slowdown,
            FLOAT32_CONFIG,
        )
