"""Files that are either whole or not there, and JSON files that may be neither."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dskd_lightning.errors import UserError

__all__ = ["read_object", "replacing", "write_atomic"]


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


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write ``content`` beside ``path``, flush it to the disk, then take its place.

    Raises:
        UserError: the folder cannot be written or the disk is full; an existing file is unharmed.
    """
    path = Path(path)
    data = content.encode("utf-8", errors="replace") if isinstance(content, str) else content
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free space or choose another folder."
        ) from error


def read_object(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file, which something may have damaged.
        remedy: how the error ends.

    Raises:
        UserError: it can't be read, isn't JSON, is nested too deep, or holds something else.
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
    return value
