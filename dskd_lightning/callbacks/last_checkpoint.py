"""The checkpoint that a run resumes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = ["LastCheckpoint"]


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``FOLDER/last.ckpt``: every so many steps, after each epoch, and where ``max_steps`` stops.

    Lightning counts an epoch that ``max_steps`` stopped in the middle as done, so that a checkpoint
    made at its end would skip the rest of its data on resuming: such a run is saved at its last
    batch instead.

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

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if 0 <= trainer.max_steps <= trainer.global_step and not self._complete(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._complete(trainer):
            self._save(trainer)

    @staticmethod
    def _complete(trainer: L.Trainer) -> bool:
        return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch

    def _save(self, trainer: L.Trainer) -> None:
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
