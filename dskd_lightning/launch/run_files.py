"""What of a run folder is a run's, and which of its checkpoints is evaluated."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dskd_lightning.checkpoints import restored

__all__ = ["EXPORTED", "clear_run", "is_exported", "trained_checkpoint"]

EXPORTED = "distillation.json"
"""In an exported folder: which checkpoint of which run it is of."""

_FOLDERS = ("checkpoints", "predictions", "alignments", "tensorboard")
_FILES = (
    ".metrics.csv.crc32", "config.yaml", "efficiency.json", "environment.json", "hparams.yaml", "metrics.csv",
    "metrics.json", "predict.json", "representation.json", "samples.json", "teacher_efficiency.json",
    "training.json",
)  # fmt: skip


def clear_run(output: str | os.PathLike[str]) -> None:
    """Remove what a run has left in its folder, and nothing else that lies there."""
    for name in _FOLDERS:
        folder = Path(output) / name
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            shutil.rmtree(folder)
    for name in _FILES:
        (Path(output) / name).unlink(missing_ok=True)


def trained_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The best checkpoint of a folder of them; the last one where no validation chose a best."""
    paths = [restored(Path(folder) / f"{name}.ckpt") for name in ("best", "last")]
    return next((path for path in paths if path.exists()), None)


def is_exported(source: object) -> bool:
    """Whether a model's source is a folder that ``dskd export`` wrote."""
    return isinstance(source, str) and (Path(source).expanduser() / EXPORTED).is_file()
