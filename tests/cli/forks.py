"""A fork of this process, which has everything imported, that becomes another program."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

__all__ = ["become"]


def become(run: Callable[[], object], out: Path, err: Path | None = None) -> NoReturn:
    """Go on as the leader of a process group of one's own that runs ``run`` and ends.

    Args:
        run: what it returns, if a number, is the exit status.
        out: file to which it adds what it prints.
        err: likewise what goes to the standard error; None for ``out``.
    """
    status = 1
    try:
        os.setsid()
        for number, path in enumerate((out, err or out), 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest has its own
        ended = run()
        status = ended if isinstance(ended, int) else 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
