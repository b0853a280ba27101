"""Devices and data to plan for that aren't here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from dskd_lightning.errors import UserError

__all__ = ["Target", "parse_bytes"]

_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"([0-9.]+)\s*([A-Za-z]+)")


@dataclass(frozen=True)
class Target:
    """What differs from the config and this machine; None for what doesn't.

    Args:
        ranks: devices in all.
        memory: bytes that are free on each.
        tflops: that a large product reaches on each, in the run's precision.
        examples: of an epoch, as long as those of the config.

    Raises:
        UserError: a number that can't be.
    """

    ranks: int | None = None
    memory: float | None = None
    tflops: float | None = None
    examples: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("ranks", 1), ("examples", 1)):
            if (count := getattr(self, name)) is not None and count < least:
                raise UserError(f"--{name} {count}: give a whole number from {least} on.")
        if self.tflops is not None and not 0 < self.tflops < math.inf:
            raise UserError(f"--tflops {self.tflops}: give what a large product reaches, such as 400.")

    @property
    def devices(self) -> bool:
        """Whether it is about other devices than this machine's."""
        return self.memory is not None or self.tflops is not None

    @property
    def trainer(self) -> list[str]:
        """Options of a Trainer for so many devices that needs none of them here."""
        if self.ranks is None and not self.devices:
            return []
        ranks = [] if self.ranks is None else [f"--trainer.devices={self.ranks}", "--trainer.num_nodes=1"]
        return ["--trainer.accelerator=cpu", *ranks]


def parse_bytes(text: str) -> float:
    """Bytes of ``80GiB`` or ``500 GB``.

    Raises:
        UserError: it is none.
    """
    found = _SIZE.fullmatch(text.strip())
    try:
        size = float(found[1]) * _UNITS[found[2]] if found else math.nan
    except (ValueError, KeyError):
        size = math.nan
    if not 0 < size < math.inf:
        raise UserError(f"--memory {text}: give a number and a unit, such as 80GiB or 24GB.")
    return size
