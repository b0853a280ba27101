"""The checkpoint with the best validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = ["BestCheckpoint"]


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``FOLDER/best.ckpt``, and knows it again where the run's folder was moved.

    Args:
        folder: where the checkpoint is.
        monitor: what is compared; lower is better.
    """

    def __init__(self, folder: str | Path, monitor: str = "val/nll_per_token") -> None:
        super().__init__(
            folder,
            filename="best",
            monitor=monitor,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = self.dirpath

        def here(path: str) -> str:
            moved = Path(folder or "") / Path(path).name
            return str(moved) if path and moved.exists() else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {key: here(state_dict.get(key, "")) for key in paths}
        kept = {here(path): score for path, score in state_dict.get("best_k_models", {}).items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": kept, "dirpath": folder})
