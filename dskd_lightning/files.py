"""Files that are either whole or not there, and JSON files that may be neither."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dskd_lightning.errors import UserError

__all__ = [
    "look_anew", "put_in_place", "read_if_there", "read_object", "replacing", "sealed", "unsealed",
    "write_atomic", "write_object",
]  # fmt: skip

_SEAL = "crc32"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path``, synced and moved to its place at the end unless something raises.

    Raises:
        OSError: the folder cannot be written or the disk is full; an existing file is unharmed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(made: Path, folder: Path) -> bool:
    """Move the folder ``made`` to its place; False where another process was first, whose stays.

    Raises:
        OSError: it can't be moved, and nobody was first.
    """
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        return False
    return True


def look_anew(folder: Path) -> None:
    """NFS remembers for half a minute what wasn't in a folder when it was looked for, unless it is opened."""
    with contextlib.suppress(OSError):
        os.close(os.open(folder, os.O_RDONLY))


def write_atomic(path: str | os.PathLike[str], content: str | bytes | Iterable[str]) -> None:
    """Write ``content`` beside ``path``, flush it to the disk, then take its place.

    Args:
        path: the file.
        content: all of it, or its pieces, of which one at a time is in memory.

    Raises:
        UserError: the folder cannot be written or the disk is full; an existing file is unharmed.
    """
    path = Path(path)
    pieces = [content] if isinstance(content, (str, bytes)) else content
    try:
        with replacing(path) as temporary, temporary.open("wb") as stream:
            for piece in pieces:
                stream.write(piece if isinstance(piece, bytes) else piece.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free space or choose another folder."
        ) from error


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` as a file in UTF-8 gives them back, with a checksum of them under ``crc32``."""
    content = json.loads(json.dumps(dict(values), ensure_ascii=False).encode("utf-8", errors="replace"))
    return {**content, _SEAL: _checksum(content)}


def unsealed(values: dict[str, Any], where: str, remedy: str) -> dict[str, Any]:
    """What was `sealed`; values without a checksum are taken as they are.

    Args:
        values: of a JSON object.
        where: names it in the error.
        remedy: how the error ends.

    Raises:
        UserError: they aren't as they were written.
    """
    content = {key: value for key, value in values.items() if key != _SEAL}
    if _SEAL in values and values[_SEAL] != _checksum(content):
        raise UserError(
            f"{where}: isn't as it was written (its checksum differs); if you have changed it on purpose "
            f"take its {_SEAL!r} out, otherwise {remedy}."
        )
    return content


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def write_object(path: str | os.PathLike[str], values: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write ``values`` as `write_atomic` does, as JSON with a checksum that `read_object` compares.

    Raises:
        UserError: the folder cannot be written or the disk is full; an existing file is unharmed.
    """
    write_atomic(path, json.dumps(sealed(values), ensure_ascii=False, indent=indent) + "\n")


def read_object(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """The object in a JSON file, without its checksum where `write_object` has written it.

    Args:
        path: the file, which something may have damaged.
        remedy: how the error ends.

    Raises:
        UserError: it can't be read, isn't JSON, is nested too deep, holds something else, or isn't as it
            was written.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}.") from error
    except RecursionError as error:
        raise UserError(f"{path}: is nested too deep; {remedy}.") from error
    except ValueError as error:  # JSON, UTF-8, and Python's limit on the digits of a number
        raise UserError(f"{path}: malformed JSON ({error}); {remedy}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object, not {type(value).__name__}; {remedy}.")
    return unsealed(value, str(path), remedy)


def read_if_there(path: Path, remedy: str) -> dict[str, Any] | None:
    """As `read_object`, None where there is no file, or no longer: other processes write and delete it.

    Raises:
        UserError: there is one, and it can't be read or isn't as it was written.
    """
    try:
        return read_object(path, remedy)
    except UserError as error:
        # Not whether it exists now: another process may have written it since.
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
