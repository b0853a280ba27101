"""Checkpoints, files and folders alike, read only where they are what was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from dskd_lightning.checkpoints.files import DamagedError, check_file, file_digest, load_file
from dskd_lightning.checkpoints.folders import check_folder, folder_digest, load_folder, restored
from dskd_lightning.errors import UserError
from dskd_lightning.ranks import gathered

__all__ = ["READ_DIGEST_KEY", "check_checkpoint", "digest_of", "read_checkpoint", "read_identified"]

READ_DIGEST_KEY = "read_digest"
"""Under which a Trainer's strategy hands on what `digest_of` said of the checkpoint that it read."""

_T = TypeVar("_T")


def check_checkpoint(path: str | os.PathLike[str]) -> str:
    """Compare a checkpoint with its digest, which is returned (`digest_of`).

    Raises:
        UserError: it is damaged, with the one beside it that can be used.
    """
    return _of_one_save(Path(path), _check)[1]


def read_checkpoint(path: str | os.PathLike[str], mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's content on the CPU; of a folder, all but the optimiser's states.

    Args:
        path: a file, or a folder of shards.
        mmap: leave tensors in the file until they are read.

    Raises:
        UserError: it is damaged, with the one beside it that can be used.
    """
    return read_identified(path, mmap)[0]


def read_identified(path: str | os.PathLike[str], mmap: bool = False) -> tuple[dict[str, Any], str]:
    """What `read_checkpoint` gives, and `digest_of` just that."""

    def read(path: Path) -> dict[str, Any]:
        _check(path)
        return load_folder(path) if path.is_dir() else load_file(path, mmap)

    return _of_one_save(Path(path), read)


def digest_of(path: str | os.PathLike[str]) -> str:
    """What a checkpoint's content is called by: 16 hexadecimal digits."""
    path = restored(Path(path))
    return (folder_digest(path) if path.is_dir() else file_digest(path))[:16]


def _of_one_save(path: Path, read: Callable[[Path], _T]) -> tuple[_T, str]:
    """What ``read`` makes of a checkpoint and its digest, though a training may replace it meanwhile."""
    while True:
        before, content, error = _digest(path), None, None
        sharded = restored(path).is_dir()
        try:
            content = read(path)
        except Exception as found:
            error = found
        replaced = _digest(path) != before
        if any(gathered(replaced)) if sharded else replaced:  # ranks read folders together, files alone
            continue
        if isinstance(error, DamagedError):
            raise _unusable(path, error) from error
        if error is not None:
            raise error
        return cast("_T", content), cast("str", before)


def _digest(path: Path) -> str | None:
    try:
        return digest_of(path)
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
