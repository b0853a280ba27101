"""How many files a process may have open, of which each mapped one is one."""

from __future__ import annotations

import weakref

from dskd_lightning.errors import UserError

__all__ = ["allow_open_files"]

_OTHERS = 512
"""That are open besides: libraries, sockets, pipes."""
_counts: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
"""How many files each owner maps while it lives."""


def allow_open_files(owner: object, count: int) -> None:
    """Let this process, and those that it starts from now on, map so many files of prepared data.

    Args:
        owner: which maps them while it lives, beside those of others.
        count: of its files.

    Raises:
        UserError: the operating system doesn't.
    """
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _counts[owner] = count
    mapped = sum(_counts.values())
    needed = mapped + _OTHERS
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{mapped:,} files of prepared data must be open at once, but a process may open no more than "
            f"{hard:,} here: raise that limit (`ulimit -Hn`), or join the data files into fewer."
        ) from error
