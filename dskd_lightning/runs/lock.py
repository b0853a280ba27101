"""One process at a time works in a run folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from dskd_lightning.errors import UserError

__all__ = ["lock_run"]

logger = logging.getLogger(__name__)
_held: dict[Path, int] = {}


def lock_run(folder: str | os.PathLike[str]) -> None:
    """Keep the folder to this process and those it forks, until they have ended, however they do.

    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    Path(folder).mkdir(parents=True, exist_ok=True)  # not through a link that leads nowhere
    path = Path(folder).resolve() / ".lock"
    if path in _held:
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(
            f"--output: another process works in {folder}: wait until it has ended, or name another folder."
        ) from error
    except OSError as error:  # a file system without locks
        logger.warning("%s can't be locked (%s): start no second run in it", folder, error.strerror)
    _held[path] = handle
