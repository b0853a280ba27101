"""A process ends with the one that started it, however that ended."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable

__all__ = ["end_with_parent"]


def end_with_parent(end: Callable[[], object]) -> None:
    """Call ``end``, from a thread, once the process that `multiprocessing` started this one from is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        end()

    threading.Thread(target=wait, daemon=True).start()
