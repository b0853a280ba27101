"""`dskd`, with a pause after each batch and a note of where it is: something to kill."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from dskd_lightning.callbacks import TrainingMonitor
from dskd_lightning.cli.main import entry_point

_original = TrainingMonitor.on_train_batch_end


def _slow(self: TrainingMonitor, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
    _original(self, trainer, module, outputs, batch, batch_idx)
    with (Path(trainer.default_root_dir) / "progress.txt").open("a") as stream:
        stream.write(f"{trainer.current_epoch} {batch_idx}\n")
    time.sleep(float(os.environ["DSKD_TEST_DELAY"]))


TrainingMonitor.on_train_batch_end = _slow  # type: ignore[method-assign]

if __name__ == "__main__":
    entry_point()
