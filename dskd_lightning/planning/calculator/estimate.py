"""Everything at once: memory, traffic, time and disk of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dskd_lightning.planning.calculator.disk import disk, host
from dskd_lightning.planning.calculator.memory import memory
from dskd_lightning.planning.calculator.shapes import DataSize, Layout, Losses, ModelSize
from dskd_lightning.planning.calculator.traffic import traffic
from dskd_lightning.planning.calculator.work import work

__all__ = ["REACHED", "Estimate", "estimate"]

REACHED = 0.35
"""Share of a large product's speed that training reaches."""


@dataclass(frozen=True)
class Estimate:
    """What a run takes, by cause.

    Args:
        memory: bytes on each rank's device.
        traffic: bytes that each rank sends in an optimizer step, and receives.
        disk: bytes.
        host: bytes of each rank in the host's memory: what grows with the data, and layers kept there.
        work: floating-point operations of the whole fit on all ranks.
        steps: optimizer steps.
        ranks: devices.
    """

    memory: dict[str, float]
    traffic: dict[str, float]
    disk: dict[str, float]
    host: dict[str, float]
    work: dict[str, float]
    steps: int
    ranks: int

    @property
    def bytes(self) -> float:
        """All of a rank's memory."""
        return sum(self.memory.values())

    @property
    def sent(self) -> float:
        """All bytes that a rank sends in a step."""
        return sum(self.traffic.values())

    def seconds(self, speed: float) -> float:
        """Of the whole fit where the network is no limit.

        Args:
            speed: operations a second of a large product on one rank.
        """
        return sum(self.work.values()) / (self.ranks * speed * REACHED)

    def bandwidth(self, speed: float) -> float:
        """Bytes a second of each rank below which the network takes longer than the products."""
        return self.sent * self.steps / self.seconds(speed)


def estimate(
    student: ModelSize,
    teachers: Sequence[ModelSize],
    data: DataSize,
    losses: Losses | None = None,
    layout: Layout | None = None,
) -> Estimate:
    """Count all of a fit; the teachers of a cache that is still to be made are whole while it is made.

    Args:
        student: its sizes.
        teachers: theirs.
        data: what an epoch reads.
        losses: the objective's.
        layout: the devices; None for one.
    """
    losses, layout = losses or Losses(), layout or Layout()
    return Estimate(
        memory(student, teachers, data, losses, layout),
        traffic(student, teachers, losses, layout),
        disk(student, teachers, data, losses, layout),
        host(teachers, data, layout),
        work(student, teachers, data, losses, layout),
        max(1, round(data.epochs * data.batches / (layout.ranks * layout.accumulate))),
        layout.ranks,
    )
