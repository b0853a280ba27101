"""What a variant's process says, in a file beside its results."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

__all__ = ["LOG", "kept"]

LOG = "variant.log"
"""In a run folder: all that its processes wrote to the standard error, one after the other."""


class _Both:
    """A stream whose text goes into a file, too; all else is the stream's own."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # the terminal still has it
            self._file.write(text)
            self._file.flush()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextlib.contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Until the end, add what goes to the standard error to ``LOG`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    previous = sys.stderr
    with (folder / LOG).open("a", encoding="utf-8", errors="replace") as file:
        sys.stderr = _Both(previous, file)  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stderr = previous
