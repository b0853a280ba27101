"""The checkpoint with the best validation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from dskd_lightning.callbacks.monitored import check_measured, check_value
from dskd_lightning.runs.validation_metrics import Mode, direction

if TYPE_CHECKING:
    from dskd_lightning.module import DistillationModule

__all__ = ["DEFAULT_MONITOR", "BestCheckpoint"]

DEFAULT_MONITOR = "val/nll_per_token"


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``FOLDER/best.ckpt``, and knows it again where the run's folder was moved.

    Args:
        folder: where the checkpoint is.
        monitor: the metric that validations are compared by.
        mode: ``min`` or ``max``, which is better; None knows it of the library's metrics.
    """

    def __init__(self, folder: str | Path, monitor: str = DEFAULT_MONITOR, mode: Mode | None = None) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor=monitor,
            mode=direction(monitor, mode),
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.monitor != DEFAULT_MONITOR:  # which is all that no validation leaves out
            check_measured(str(self.monitor), trainer, cast("DistillationModule", pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            check_value(str(self.monitor), trainer)
        super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = self.dirpath

        def here(path: str) -> str:
            moved = Path(folder or "") / Path(path).name
            return str(moved) if path and moved.exists() else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {key: here(state_dict.get(key, "")) for key in paths}
        kept = {here(path): score for path, score in state_dict.get("best_k_models", {}).items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": kept, "dirpath": folder})
