"""Memory, traffic, time and disk of a run, from plain numbers: see ``docs/scale.md``."""

from dskd_lightning.planning.calculator.estimate import REACHED, Estimate, estimate
from dskd_lightning.planning.calculator.shapes import DataSize, Layout, Losses, ModelSize

__all__ = ["REACHED", "DataSize", "Estimate", "Layout", "Losses", "ModelSize", "estimate"]
