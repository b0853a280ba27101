"""How many optimiser steps a training has, also where accumulation changes between epochs."""

from __future__ import annotations

import math

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler

__all__ = ["follow_accumulation", "total_steps"]


def _scheduler(trainer: L.Trainer) -> GradientAccumulationScheduler | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)


def total_steps(trainer: L.Trainer) -> float:
    """Optimiser steps of the whole training; infinite or negative where nothing ends it.

    Lightning's `estimated_stepping_batches` refuses a `GradientAccumulationScheduler` of several factors.
    """
    scheduler = _scheduler(trainer)
    if scheduler is None:
        return float(trainer.estimated_stepping_batches)
    end = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return end
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return end
    factors = map(scheduler.get_accumulate_grad_batches, range(trainer.max_epochs))
    return min(end, sum(math.ceil(batches / factor) for factor in factors))


def follow_accumulation(trainer: L.Trainer) -> None:
    """Take up the epoch's accumulation, which Lightning leaves at 1 where it resumes within an epoch."""
    scheduler = _scheduler(trainer)
    if scheduler is not None:
        trainer.accumulate_grad_batches = scheduler.get_accumulate_grad_batches(trainer.current_epoch)
