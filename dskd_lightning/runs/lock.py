"""One process at a time works in a run folder, on one variant of a study, or prepares the same data."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from multiprocessing import reduction
from pathlib import Path
from typing import IO, Any

from dskd_lightning.errors import UserError

__all__ = ["HeldLocks", "lock_run", "locked", "only_one", "take_file"]

logger = logging.getLogger(__name__)
_held: dict[Path, int] = {}


def lock_run(folder: str | os.PathLike[str]) -> None:
    """Keep the folder to this process and those it forks, until they have ended, however they do.

    Raises:
        UserError: another process holds it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)  # not through a link that leads nowhere
    path = Path(folder).resolve() / ".lock"
    if path not in _held and not _take(path, folder):
        raise UserError(
            f"--output: another process works in {folder}: wait until it has ended, or name another folder."
        )


@contextlib.contextmanager
def locked(path: Path, held_elsewhere: str) -> Iterator[None]:
    """Hold a lock, which processes that are started meanwhile hold too, see `HeldLocks`.

    Args:
        path: the lock's file.
        held_elsewhere: what to say then.

    Raises:
        UserError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    if not _take(path, path.parent):
        raise UserError(held_elsewhere)
    try:
        yield
    finally:
        if (handle := _held.pop(path, None)) is not None:
            os.close(handle)


class HeldLocks:
    """The locks of this process as an argument of one that it spawns: that one holds them until it ends."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, tuple(map(reduction.DupFd, _held.values()))


def _receive(*handles: Any) -> HeldLocks:
    for handle in handles:
        handle.detach()  # open until the process ends
    return HeldLocks()


def _take(path: Path, folder: str | os.PathLike[str]) -> bool:
    """Whether this process has the lock now; without locks, nobody else has it."""
    try:
        import fcntl
    except ImportError:  # on Windows
        return True
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    except OSError as error:  # a file system without locks
        logger.warning("%s can't be locked (%s): start no second run in it", folder, error.strerror)
    _held[path] = handle
    return True


def take_file(file: IO[Any], shared: bool = False) -> bool:
    """Hold an open file until it is closed, however; False where another process holds it.

    Args:
        file: what is written or, where it is ``shared``, looked at by others too.
        shared: keep out those alone that hold it without.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


@contextlib.contextmanager
def only_one(path: Path, what: str, wait: bool = True) -> Iterator[bool | None]:
    """Let one process at a time in, the others when it has ended, however it does.

    Gives False where the file system has no locks, and None where another is inside that isn't waited for.

    Args:
        path: of the lock, a file beside what it is about.
        what: that the one inside does, for those that wait.
        wait: until nobody else is inside.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    while True:
        with path.open("a") as file:
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        yield None
                        return
                    logger.info("Waiting for another process that %s.", what)
                    fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                yield False
                return
            if not _is(file.fileno(), path):  # the one before has deleted it, and others lock a new one
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:  # over NFS the handle is stale, too
        return False
