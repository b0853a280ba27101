"""What a training loop needs around an objective: optimiser groups, schedules, exact means."""

from dskd_lightning.training.meter import RatioMeter
from dskd_lightning.training.optimization import cosine_with_warmup, follow_schedule, parameter_groups

__all__ = ["RatioMeter", "cosine_with_warmup", "follow_schedule", "parameter_groups"]
