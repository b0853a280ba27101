"""How a Trainer writes and reads checkpoint files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from dskd_lightning.checkpoints.checks import READ_DIGEST_KEY, read_identified
from dskd_lightning.checkpoints.files import write_file

__all__ = ["WholeCheckpointIO", "use_whole_checkpoints"]


class WholeCheckpointIO(TorchCheckpointIO):
    """Files that are whole or absent, with a digest that is compared when they are read.

    They are read to the CPU, as Lightning does, but by name: PyTorch can't rebuild tensor subclasses, such
    as the states of torchao's 8-bit optimizers, where a function maps devices. Only data is read, whatever
    ``weights_only`` says. Paths on other than local file systems are Lightning's.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_file(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        handed_over = Path(path).name == ".temp.ckpt"  # weights alone, by which a forked rank gives them back
        if handed_over or not _is_local_file_protocol(path):
            return super().load_checkpoint(path, "cpu", True if handed_over else weights_only)  # type: ignore[arg-type]
        if not Path(path).exists():
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        checkpoint, digest = read_identified(path)
        return {**checkpoint, READ_DIGEST_KEY: digest}


def use_whole_checkpoints(trainer: L.Trainer) -> None:
    """Let a Trainer on one device or with DDP write files that way, unless it was given another way."""
    strategy = trainer.strategy
    if (
        isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
        and type(strategy.checkpoint_io) is TorchCheckpointIO
    ):
        strategy.checkpoint_io = WholeCheckpointIO()
