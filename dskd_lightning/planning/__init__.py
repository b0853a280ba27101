"""Before a run: what it needs, what the machine has, and a config to begin with."""

from dskd_lightning.planning.calculator import DataSize, Estimate, Layout, Losses, ModelSize, estimate
from dskd_lightning.planning.doctor import Finding, examine
from dskd_lightning.planning.first_config import Plan, plan
from dskd_lightning.planning.machine import Machine
from dskd_lightning.planning.sizes import model_size

__all__ = [
    "DataSize",
    "Estimate",
    "Finding",
    "Layout",
    "Losses",
    "Machine",
    "ModelSize",
    "Plan",
    "estimate",
    "examine",
    "model_size",
    "plan",
]
