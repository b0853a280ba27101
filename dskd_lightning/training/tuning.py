"""Lightning's search for a learning rate or a batch size, as far as it can be trusted here."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from dskd_lightning.errors import UserError

__all__ = ["check_tuning"]


def check_tuning(trainer: L.Trainer) -> None:
    """Refuse a search whose result training wouldn't use.

    Raises:
        UserError: it would begin when the schedule is made already, or looks for what isn't in use.
    """
    for callback in cast("Any", trainer).callbacks:
        if not isinstance(callback, LearningRateFinder | BatchSizeFinder):
            continue
        search = "lr_find" if isinstance(callback, LearningRateFinder) else "scale_batch_size"
        if not callback._early_exit:  # which a Tuner sets: training comes later, with a schedule of its own
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} searches when the schedule is made already: "
                f"call lightning.pytorch.tuner.Tuner(trainer).{search}(module, datamodule=data) before fit."
            )
        if isinstance(cast("Any", trainer.strategy).launcher, _MultiProcessingLauncher):
            raise UserError(
                "A search inside of processes that the Trainer forks or spawns can't tell what it found: "
                "search with one device, or start the ranks with torchrun."
            )
        limit = getattr(cast("Any", trainer).datamodule, "max_tokens_per_batch", None)
        if isinstance(callback, BatchSizeFinder) and limit is not None:
            raise UserError(
                f"data.max_tokens_per_batch: {limit} says how large batches are, whatever batch_size is: set "
                "it to null to search for a batch size."
            )
