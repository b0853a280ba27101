"""The study that a newcomer runs first, in the precision that suits the processor."""

from __future__ import annotations

import logging

from dskd_lightning.study.study import Study
from dskd_lightning.training.processor import FLOAT32_CONFIG, SLOW, bfloat16_slowdown

__all__ = ["quickstart_study"]

logger = logging.getLogger(__name__)


def quickstart_study(output: str) -> Study:
    """``dskd:quickstart.study`` as it stands, or in float32 where the processor only emulates bfloat16.

    Args:
        output: folder of the study.
    """
    study = Study.read("dskd:quickstart.study", output)
    slowdown = bfloat16_slowdown()
    if slowdown <= SLOW:
        return study
    logger.info(
        "bfloat16 takes %.0f times as long as float32 on this processor: computing in float32 (%s).",
        slowdown,
        FLOAT32_CONFIG,
    )
    return study.over(FLOAT32_CONFIG)
