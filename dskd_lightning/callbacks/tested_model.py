"""Which model a Trainer's results are of."""

from __future__ import annotations

import os
from typing import Any, cast

import lightning as L

from dskd_lightning.module import DistillationModule
from dskd_lightning.runs.identity import model_identity

__all__ = ["tested_model"]


def tested_model(
    output: str | os.PathLike[str], trainer: L.Trainer, module: L.LightningModule
) -> dict[str, Any]:
    """The checkpoint that was read for a test or prediction, else the model that this process has trained."""
    if trainer.state.fn == "fit" or not trainer.ckpt_path:
        return model_identity(output, trainer.global_step)
    read = cast("DistillationModule", module)
    return model_identity(output, read.trained_steps, trainer.ckpt_path, read.read_digest)
