"""What of a run folder is a run's, and which of its checkpoints is evaluated."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from dskd_lightning.checkpoints import restored
from dskd_lightning.errors import UserError

__all__ = ["EXPORTED", "clear_run", "find_checkpoint", "is_exported", "trained_checkpoint"]

logger = logging.getLogger(__name__)

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


def find_checkpoint(run: str | os.PathLike[str], ckpt_path: str | None = None) -> Path:
    """The checkpoint of a run folder that is asked for.

    Args:
        run: the run folder.
        ckpt_path: ``best``, ``last`` or a file; None takes the best, or the last one where no validation
            chose a best.

    Raises:
        UserError: it is not there.
    """
    folder = Path(run) / "checkpoints"
    found = trained_checkpoint(folder)
    if ckpt_path is None:
        if found is None:
            raise UserError(f"There is neither best.ckpt nor last.ckpt in {folder}: train first.")
        if found.stem != "best":
            logger.info("%s, since no validation has chosen a best one", found)
        return found
    path = folder / f"{ckpt_path}.ckpt" if ckpt_path in ("best", "last") else Path(ckpt_path)
    if not restored(path).exists():
        there = "train first" if found is None else f"`--ckpt_path {found.stem}` is there"
        raise UserError(f"--ckpt_path {ckpt_path}: {path} does not exist; {there}.")
    return path


def is_exported(source: object) -> bool:
    """Whether a model's source is a folder that ``dskd export`` wrote."""
    return isinstance(source, str) and (Path(source).expanduser() / EXPORTED).is_file()
