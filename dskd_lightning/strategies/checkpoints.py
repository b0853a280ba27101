"""Checkpoints of sharded modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["WithTrainedNames"]


class WithTrainedNames:
    """Mixin of sharded strategies: a loaded checkpoint keeps its tensors' names.

    Lightning's sharded strategies load the weights themselves and hand on what is left, but
    `DistillationModule.on_load_checkpoint` compares the names with those that it trains.
    """

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)  # type: ignore[misc]
        if "state_dict" not in checkpoint:
            checkpoint["state_dict"] = dict.fromkeys(_names(Path(checkpoint_path)))
        return checkpoint


def _names(path: Path) -> list[str]:
    """Names of the module's tensors in a checkpoint file, or folder of shards."""
    if path.is_file():
        return list(torch.load(path, mmap=True, map_location="cpu", weights_only=True)["state_dict"])
    from torch.distributed.checkpoint import FileSystemReader

    keys = FileSystemReader(path).read_metadata().state_dict_metadata
    return [key.removeprefix("state_dict.").removeprefix("model.") for key in keys]
