"""Rows of ``metrics.csv``, and the checksum beside it of what has been written of it."""

from __future__ import annotations

import contextlib
import csv
import io
import zlib
from pathlib import Path

from dskd_lightning.errors import UserError
from dskd_lightning.files import write_atomic

__all__ = ["checksum_file", "read_rows", "write_checksum"]


def checksum_file(path: Path) -> Path:
    """Beside ``metrics.csv``, which grows and has no place for a checksum: how much of it was written, and
    the CRC-32 of that."""
    return path.with_name(f".{path.name}.crc32")


def write_checksum(path: Path, size: int, crc32: int) -> None:
    """Note the first ``size`` bytes of ``path``, which are on the disk; what a killed process added to them
    isn't checked.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    write_atomic(checksum_file(path), f"{size} {crc32}\n")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Every row, without its empty cells; a last line that was cut off in writing is left out.

    Raises:
        UserError: the file is not what a CSV logger writes, or not as it was written.
    """
    try:
        text = _content(path).decode("utf-8")
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole, newline=""), strict=True)
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more columns than the header")
            for name in ("step", "epoch"):
                float(row.get(name) or 0)
            rows.append({name: value for name, value in row.items() if value})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except UserError:
        raise
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: is damaged ({error}); correct it, or move it away to go on without its curves."
        ) from error
    return rows


def _content(path: Path) -> bytes:
    """All of the file, which a run may be writing: as its note was before and after it was read."""
    while True:
        note, content = _note(path), path.read_bytes()
        if _note(path) == note:
            _check(path, content, note)
            return content


def _note(path: Path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return checksum_file(path).read_bytes()
    return None


def _check(path: Path, content: bytes, note: bytes | None) -> None:
    if note is None:
        return
    size, _, crc32 = note.decode("ascii", errors="replace").strip().partition(" ")
    known = size.isdecimal() and int(size) <= len(content) and str(zlib.crc32(content[: int(size)])) == crc32
    if not known:
        raise UserError(
            f"{path}: isn't as it was written (its checksum in {checksum_file(path).name} differs); if you "
            "have changed it on purpose delete that file, otherwise move both away to go on without its "
            "curves."
        )
