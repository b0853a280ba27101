"""Checkpoints of sharded modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dskd_lightning.checkpoints import READ_DIGEST_KEY, check_checkpoint, write_folder
from dskd_lightning.checkpoints.folders import tensor_names

__all__ = ["WholeCheckpoints"]


class WholeCheckpoints:
    """Mixin of sharded strategies: checkpoints are whole or absent, checked, and keep their tensors' names.

    Lightning's sharded strategies load the weights themselves and hand on what is left, but
    `DistillationModule.on_load_checkpoint` compares the names with those that it trains.
    """

    _save_distributed_checkpoint: bool

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        save = super().save_checkpoint  # type: ignore[misc]
        if self._save_distributed_checkpoint:
            path = Path(self.broadcast(filepath))  # type: ignore[attr-defined]
            write_folder(path, lambda part: save(checkpoint, part, storage_options))
        else:
            save(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        digest = check_checkpoint(checkpoint_path)
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)  # type: ignore[misc]
        if "state_dict" not in checkpoint:
            checkpoint["state_dict"] = dict.fromkeys(_names(Path(checkpoint_path)))
        checkpoint[READ_DIGEST_KEY] = digest
        return checkpoint


def _names(path: Path) -> list[str]:
    """Names of the module's tensors in a checkpoint file, or folder of shards."""
    if path.is_file():
        return list(torch.load(path, mmap=True, map_location="cpu", weights_only=True)["state_dict"])
    return [name.removeprefix("model.") for name in tensor_names(path)]
