"""Checkpoints, files and folders alike, read only where they are what was written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dskd_lightning.checkpoints.files import DamagedError, check_file, file_digest, load_file
from dskd_lightning.checkpoints.folders import check_folder, folder_digest, load_folder, restored
from dskd_lightning.errors import UserError
from dskd_lightning.ranks import gathered

__all__ = ["check_checkpoint", "digest_of", "read_checkpoint"]


def check_checkpoint(path: str | os.PathLike[str]) -> None:
    """Compare a checkpoint with its digest.

    Raises:
        UserError: it is damaged, with the one beside it that can be used.
    """
    path = Path(path)
    try:
        _check(path)
    except DamagedError as error:
        raise _unusable(path, error) from error


def read_checkpoint(path: str | os.PathLike[str], mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's content on the CPU; of a folder, all but the optimiser's states.

    Args:
        path: a file, or a folder of shards.
        mmap: leave tensors in the file until they are read.

    Raises:
        UserError: it is damaged, with the one beside it that can be used.
    """
    path = Path(path)
    try:
        if restored(path).is_dir():
            return _read_folder(path)
        check_file(path)
        return load_file(path, mmap)
    except DamagedError as error:
        raise _unusable(path, error) from error


def digest_of(path: str | os.PathLike[str]) -> str:
    """What a checkpoint's content is called by: 16 hexadecimal digits."""
    path = restored(Path(path))
    return (folder_digest(path) if path.is_dir() else file_digest(path))[:16]


def _read_folder(path: Path) -> dict[str, Any]:
    """All of it from one save, though a training may replace the folder between two of its files."""
    while True:
        before, error = _listed(path), None
        content: dict[str, Any] = {}
        try:
            check_folder(path)
            content = load_folder(path)
        except Exception as found:
            error = found
        if any(gathered(_listed(path) != before)):
            continue
        if error is not None:
            raise error
        return content


def _listed(path: Path) -> str | None:
    try:
        return folder_digest(restored(path))
    except OSError:
        return None


def _check(path: Path) -> None:
    (check_folder if restored(path).is_dir() else check_file)(path)


def _unusable(path: Path, error: DamagedError) -> UserError:
    for other in sorted(path.parent.glob("*.ckpt"), key=lambda p: (p.stem not in ("last", "best"), p.name)):
        if other == path:
            continue
        try:
            _check(other)
            if other.is_file():
                load_file(other, mmap=True)
        except DamagedError:
            continue
        return UserError(f"{path} can't be used ({error}): give the one beside it, --ckpt_path {other}.")
    return UserError(
        f"{path} can't be used ({error}), nor any other checkpoint beside it: train again with "
        "`--overwrite true`, or restore a copy."
    )
