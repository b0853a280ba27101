"""Files that are either whole or not there, and JSON files that may be neither."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from dskd_lightning.errors import UserError

__all__ = ["read_object", "write_atomic"]


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write ``content`` beside ``path``, flush it to the disk, then take its place.

    Raises:
        UserError: the folder cannot be written or the disk is full; an existing file is unharmed.
    """
    path = Path(path)
    data = content.encode("utf-8", errors="replace") if isinstance(content, str) else content
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
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
