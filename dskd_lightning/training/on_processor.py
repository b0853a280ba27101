"""A Trainer whose device is the processor: its threads, and a word where it would crawl."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, cast

import lightning as L

from dskd_lightning.errors import UserError
from dskd_lightning.models.loading import load_config
from dskd_lightning.models.sources import resolve_source
from dskd_lightning.models.spec import ModelSpec
from dskd_lightning.processor import FLOAT32_CONFIG, SLOW, limit_threads, slowdown

__all__ = ["suit_processor"]

logger = logging.getLogger(__name__)


def suit_processor(trainer: L.Trainer, specs: Iterable[object]) -> None:
    """Limit the threads of a Trainer on the CPU, and say where it or its models would crawl in bfloat16.

    Args:
        trainer: that is about to run.
        specs: of its models; those in memory have no ``dtype`` to change.
    """
    if trainer.strategy.root_device.type != "cpu":
        return
    limit_threads(trainer.num_devices)
    precision = str(cast("Any", trainer).precision)
    if not precision.startswith("bf16") and "bfloat16" not in map(_dtype, specs):
        return
    if (times := slowdown()) > SLOW:
        logger.warning(
            "This processor takes %.0f times as long in bfloat16 as in float32: lay `--config %s` over "
            "yours, or set trainer.precision to 32-true and the models' dtype to float32.",
            times,
            FLOAT32_CONFIG,
        )


def _dtype(spec: object) -> str | None:
    """The weights' type, also where ``auto`` leaves it to the checkpoint; None where nothing is known."""
    dtype = getattr(spec, "dtype", None)
    if dtype != "auto" or not isinstance(spec, ModelSpec):
        return dtype
    try:
        if resolve_source(spec.source).gguf is not None:
            return "float32"
        return str(getattr(load_config(spec), "dtype", None)).removeprefix("torch.")
    except UserError:  # is told where the model is loaded, which with a teacher's cache it needn't be
        return None
