"""What the training of a run has cost, on disk beside it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L

from dskd_lightning.files import write_object
from dskd_lightning.memory import peak_memory_bytes
from dskd_lightning.runs.identity import MODEL_KEY, model_identity

__all__ = ["TrainingCost"]


class TrainingCost(L.Callback):
    """Writes ``OUTPUT/training.json``: seconds, steps, devices and peak memory of a fit.

    Seconds are wall-clock, from the built models to the end of the fit, validation included; preparing the
    data, a teacher cache, and what pruning measures are not. A resumed run counts on from its checkpoint.
    Memory is that of the first process.

    Args:
        output: the run folder.
    """

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)
        self._earlier = 0.0
        self._since: float | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not in setup: `configure_model`, which computes the teacher cache, comes after it.
        self._since = time.perf_counter()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        cost = {
            "seconds": self._seconds(),
            "steps": trainer.global_step,
            "devices": trainer.world_size,
            "peak_bytes": peak_memory_bytes(),
            MODEL_KEY: model_identity(self.output, trainer.global_step),
        }
        if trainer.is_global_zero:
            write_object(self.output / "training.json", cost)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = state_dict["seconds"]

    def _seconds(self) -> float:
        return self._earlier + (0.0 if self._since is None else time.perf_counter() - self._since)
