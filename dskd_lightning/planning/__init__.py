"""Before a run: what it needs, what the machine has, and a config to begin with."""

from dskd_lightning.planning.doctor import Finding, examine
from dskd_lightning.planning.estimate import Estimate, estimate
from dskd_lightning.planning.first_config import Plan, plan
from dskd_lightning.planning.machine import Machine
from dskd_lightning.planning.sizes import ModelSize, model_size

__all__ = ["Estimate", "Finding", "Machine", "ModelSize", "Plan", "estimate", "examine", "model_size", "plan"]
