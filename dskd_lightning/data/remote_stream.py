"""The bytes of a file elsewhere, piece by piece, whatever the connection does meanwhile."""

from __future__ import annotations

import contextlib
import functools
import io
import time
from collections.abc import Callable
from typing import Any

from dskd_lightning.data.remote_faults import Patience, within
from dskd_lightning.errors import UserError

__all__ = ["RemoteStream"]

_LEAST, _FIRST, _MOST = 1 << 12, 1 << 16, 8 << 20
"""Bytes of a piece: the next one is twice as large where the last took less than `_QUICK` seconds."""
_QUICK = 2.0


class _Handle:
    """An open file and the place that it is read at."""

    def __init__(self, file: Any) -> None:
        self.file, self.at = file, 0

    def read(self, count: int) -> bytes:
        """Up to the end of the file, or of the connection."""
        pieces = bytearray()
        while len(pieces) < count and (piece := self.file.read(count - len(pieces))):
            pieces += piece
        self.at += len(pieces)
        return bytes(pieces)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # of a connection that is lost
            self.file.close()


class RemoteStream(io.RawIOBase):
    """A file that holds one piece of at most 8 MiB in memory and nothing on the disk.

    After a failure it goes on at the byte where it was; where the server can't begin there, it reads what is
    in front again and throws it away.

    Args:
        open: opens the file; False for one that is read from its beginning.
        size: of the file, None where the server doesn't say it.
        patience: with failures.
        check: called before reading goes on after a failure; raises where the file has changed.
        ranges: whether the server can begin in the middle, as far as is known.
        refusal: what to raise where it can't, None to read from the beginning.
    """

    def __init__(
        self,
        open: Callable[[bool], Any],
        size: int | None,
        patience: Patience,
        check: Callable[[], None],
        ranges: bool = True,
        refusal: UserError | None = None,
    ) -> None:
        self._open, self._size, self._patience, self._check = open, size, patience, check
        self._ranges, self._refusal = ranges, refusal
        self._handle: _Handle | None = None
        self._piece, self._position, self._next = memoryview(b""), 0, _FIRST
        self._attempt = 0
        if not ranges:
            self._without_ranges()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._size is not None

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            if self._size is None:
                raise io.UnsupportedOperation("the size isn't known")
            offset += self._size
        ahead = offset - self._position
        if not 0 <= ahead <= len(self._piece):
            self._next, ahead = _FIRST, len(self._piece)
        self._piece, self._position = self._piece[ahead:], offset
        return offset

    def readinto(self, buffer: Any) -> int:
        if not self._piece:
            self._fetch()
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._piece))
        target[:count] = self._piece[:count]
        self._piece, self._position = self._piece[count:], self._position + count
        return count

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None
        super().close()

    def _fetch(self) -> None:
        """The next piece, or none at the end."""
        found: bytes | None = None
        while found is None:
            count = self._next if self._size is None else min(self._next, self._size - self._position)
            if count <= 0:
                return
            handle, self._handle = self._handle, None
            begun = time.monotonic()
            try:
                self._handle, found = within(functools.partial(self._read, handle, count, self._attempt))
            except Exception as error:
                self._attempt += 1
                if self._ranges and self._position and _wants_beginning(error):
                    self._without_ranges()
                    continue
                self._next = max(_LEAST, self._next // 4)
                self._patience.failed(error)
                self._check()
        self._patience.progressed()
        if time.monotonic() - begun < _QUICK:
            self._next = min(_MOST, 2 * self._next)
        self._piece = memoryview(found)

    def _read(self, handle: _Handle | None, count: int, attempt: int) -> tuple[_Handle, bytes | None]:
        """The next ``count`` bytes; None where more of what is in front of them had to be thrown away."""
        if handle is not None and not self._ranges and handle.at > self._position:
            handle.close()
            handle = None
        handle = handle or _Handle(self._open(self._ranges))
        try:
            if self._ranges:
                handle.at = handle.file.seek(self._position)
            elif handle.at < self._position:
                if not handle.read(min(_MOST, self._position - handle.at)):
                    raise ConnectionError(f"the file ends at byte {handle.at:,}")
                return handle, None
            found = handle.read(count)
            if self._size is not None and len(found) < count:
                raise ConnectionError(f"broke off at byte {handle.at:,} of {self._size:,}")
            if attempt != self._attempt:  # which nobody waits for any more
                handle.close()
            return handle, found
        except BaseException:
            handle.close()
            raise

    def _without_ranges(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        self._ranges = False


def _wants_beginning(error: Exception) -> bool:
    """fsspec's error of a server that answers with the whole file, wherever one begins."""
    return type(error) is ValueError and "range" in str(error)
