"""How much of a set of sources has been read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

__all__ = ["ReadShare", "told"]


class ReadShare:
    """Told by whoever reads where they are, it knows the share of the whole; bytes of files count as packed.

    Args:
        sizes: of the sources, in order, in bytes; None for one that isn't known. The size of an only source
            doesn't matter.
    """

    def __init__(self, sizes: Sequence[int | None]) -> None:
        self._sizes: Sequence[int | None] = sizes if len(sizes) > 1 else [1]
        self._at = -1
        self._within: Callable[[], float | None] = _unknown

    def next_source(self) -> None:
        """The one before is read."""
        self._at += 1
        self._within = _unknown

    def follow(self, within: Callable[[], float | None]) -> None:
        """Ask ``within`` how much of the present source is read, None where it can't say."""
        self._within = within

    def follow_bytes(self, file: IO[bytes], size: int | None) -> None:
        """The present source is read through ``file`` of ``size`` bytes; None where that isn't known."""
        if size:
            self._within = lambda: 1.0 if file.closed else min(1.0, file.tell() / size)

    def follow_rows(self, done: Callable[[], int], rows: int) -> None:
        """``done`` of the present source's ``rows`` are read."""
        if rows:
            self._within = lambda: done() / rows

    def __call__(self) -> float | None:
        """The share, from 0 to 1; None where it isn't known."""
        sizes = [size for size in self._sizes if size is not None]
        if self._at < 0 or len(sizes) < len(self._sizes) or not (whole := sum(sizes)):
            return None
        size = sizes[self._at]
        within = self._within() if size else 0.0
        return None if within is None else (sum(sizes[: self._at]) + within * size) / whole


def told(values: Iterator[tuple[int, Any]], rows: int, share: ReadShare | None) -> Iterator[tuple[int, Any]]:
    """Numbered ``values``, of which ``share`` knows how many of the ``rows`` have passed."""
    line = 0
    if share is not None:
        share.follow_rows(lambda: line, rows)
    for line, value in values:
        yield line, value


def _unknown() -> None:
    return None
