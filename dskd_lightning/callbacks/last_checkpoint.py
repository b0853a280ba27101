"""The checkpoint that a run resumes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = ["LastCheckpoint"]


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``FOLDER/last.ckpt``: every so many steps, and where an epoch or training ends.

    It is saved before the next batch begins, when all that belongs to the last one is done: its
    rows are in the log, on disk, and the validation that was due after it has run. A run that is killed
    in a validation resumes before it and runs it.

    Args:
        folder: where the checkpoint is.
        every: optimiser steps between checkpoints.
    """

    def __init__(self, folder: str | Path, every: int) -> None:
        super().__init__(
            folder,
            filename="last",
            every_n_train_steps=every,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self._every = every
        self._due = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = not trainer.fit_loop._should_accumulate()  # else gradients would be missing in it
        if stepped and self._every and trainer.global_step % self._every == 0:
            self._due = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._due:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._due = False
        if self._should_skip_saving_checkpoint(trainer):
            return
        for logger in trainer.loggers:
            logger.save()  # a resumed run logs nothing again that came before
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
