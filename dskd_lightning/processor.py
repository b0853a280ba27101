"""What suits this processor: as many threads as it may run, and no type that it only emulates."""

from __future__ import annotations

import logging
import math
import os
import time
from functools import cache
from typing import TypeVar

import torch
from torch import nn
from torch.nn.functional import linear

from dskd_lightning.cores import affine_cores, cpu_quota

__all__ = [
    "FLOAT32_CONFIG",
    "SLOW",
    "in_a_computed_type",
    "limit_threads",
    "slowdown",
    "working_device",
]

FLOAT32_CONFIG = "dskd:precision/float32"
SLOW = 1.2
"""From how many times float32's seconds on, bfloat16 is to be left alone; what it saves is memory."""
_TOKENS, _WIDTH = 128, 512
_LEAST, _MOST, _SECONDS = 5, 100, 0.5
_SHORT = (torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)


def limit_threads(processes: int = 1) -> None:
    """Let PyTorch compute with no more threads than this process has cores' time.

    PyTorch takes all physical cores that it may run on, also in a container with time on a few of them
    alone, where the threads then wait for each other. What ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` say
    stays.

    Args:
        processes: on this machine that compute at once and share a container's quota; and all cores, unless
            each is bound to some.
    """
    given, share = os.environ.get("OMP_NUM_THREADS"), max(1, affine_cores() // processes)
    # What Lightning gives to the ranks that it starts, which knows no quota, was nobody's choice.
    chosen = given is not None and not (processes > 1 and given == str(share))
    if chosen or os.environ.get("MKL_NUM_THREADS") is not None:
        return
    limits = [torch.get_num_threads()]
    if (quota := cpu_quota()) is not None:
        limits.append(int(quota / processes))
    if affine_cores() == os.cpu_count():
        limits.append(share)
    torch.set_num_threads(max(1, min(limits)))


def working_device() -> torch.device:
    """The accelerator of this process, where no Trainer has chosen one: of ``torchrun``'s its own."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    limit_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return torch.device("cpu")


_Model = TypeVar("_Model", bound=nn.Module)


def in_a_computed_type(model: _Model, device: torch.device) -> _Model:
    """``model`` as it is, or with weights of 16 bits turned to float32 where this processor emulates them.

    The numbers are the same, and take twice the memory.

    Args:
        model: changed in place.
        device: it will run on; nothing but a processor needs this.
    """
    dtype = next(model.parameters()).dtype
    if device.type == "cpu" and dtype in _SHORT and (times := slowdown(dtype)) > SLOW:
        logger.info(
            "%s takes %.0f times as long as float32 on this processor: computing in float32.",
            str(dtype).removeprefix("torch."),
            times,
        )
        model.float()
    return model


@cache
@torch.inference_mode()
def slowdown(dtype: torch.dtype = torch.bfloat16) -> float:
    """Seconds of a linear layer in ``dtype`` over those in float32 on the CPU, the best of some turns each.

    Measured once a process, in half a second at most where that is enough; of bfloat16 about 0.3 with AVX-512
    or AMX, 20 and more without.
    """
    layers = {
        kind: (torch.ones(_TOKENS, _WIDTH, dtype=kind), torch.ones(2 * _WIDTH, _WIDTH, dtype=kind))
        for kind in (dtype, torch.float32)
    }
    for layer in layers.values():
        linear(*layer)  # warm
    best = dict.fromkeys(layers, math.inf)
    turns, start = 0, time.perf_counter()
    # In turns, and many: other work stops the threads for long enough to spoil a few of one type.
    while turns < _LEAST or (turns < _MOST and time.perf_counter() - start < _SECONDS):
        for kind, layer in layers.items():
            begin = time.perf_counter()
            linear(*layer)
            best[kind] = min(best[kind], time.perf_counter() - begin)
        turns += 1
    return best[dtype] / best[torch.float32]
