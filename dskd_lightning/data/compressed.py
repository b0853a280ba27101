"""Text files, packed with gzip or Zstandard or not at all."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TextIO, cast

from dskd_lightning.data.examples import InvalidRecord
from dskd_lightning.data.read_share import ReadShare
from dskd_lightning.data.remote import DataFile, size_of
from dskd_lightning.errors import UserError

__all__ = ["PACKED", "kind_of", "not_utf8", "open_text"]

PACKED = (".gz", ".zst")


def kind_of(path: DataFile) -> str:
    """The suffix that says what a file holds: that before ``.gz`` or ``.zst``."""
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


@contextlib.contextmanager
def open_text(path: DataFile, newline: str | None = None, share: ReadShare | None = None) -> Iterator[TextIO]:
    """The file's text, unpacked as it is read; of bytes that aren't UTF-8 `not_utf8` tells.

    Args:
        path: the file.
        newline: as of `open`.
        share: told how much of the file, as it is packed, is read.

    Raises:
        UserError: it can't be unpacked.
    """
    try:
        with contextlib.ExitStack() as stack:
            raw = cast("IO[bytes]", stack.enter_context(path.open("rb")))
            if share is not None:
                share.follow_bytes(raw, size_of(path))
            if path.suffix == ".gz":
                raw = cast("IO[bytes]", stack.enter_context(gzip.GzipFile(fileobj=raw)))
            elif path.suffix == ".zst":
                import pyarrow as pa

                raw = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"))
            yield stack.enter_context(io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline))
    except (EOFError, zlib.error, OSError) as error:
        if path.suffix not in PACKED or getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"'{path}' can't be unpacked ({error}): pack or copy it again.") from error


def not_utf8(path: DataFile, line: int, text: str) -> InvalidRecord | None:
    """The error of a file's text that isn't UTF-8.

    Args:
        path: the file.
        line: on which the text begins there.
        text: of `open_text`.
    """
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte, line = ord(text[error.start]) - 0xDC00, line + text.count("\n", 0, error.start)
        return InvalidRecord(
            f"{path}:{line} isn't UTF-8 text (it holds the byte 0x{byte:02x}): save the file as UTF-8.",
            "not UTF-8",
        )
    return None
