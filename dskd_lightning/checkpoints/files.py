"""Checkpoint files: PyTorch's, with a digest of their own content in the zip archive's comment."""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch

__all__ = ["DamagedError", "check_file", "file_digest", "load_file", "sync_folder", "write_file"]

_MARK = b"dskd sha256 "
_COMMENT = len(_MARK) + 64
_LENGTH = struct.pack("<H", _COMMENT)
_CHUNK = 1 << 22


class DamagedError(Exception):
    """Why a checkpoint can't be used."""


def write_file(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint beside ``path``, flush it to the disk, then take its place.

    Any reader of PyTorch's files reads it.

    Raises:
        OSError: it can't be written; what was there is unharmed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.part"  # one name: a kill leaves one file, which the next save takes
    try:
        with part.open("w+b") as stream:
            hashing = _Hashing(stream)
            torch.save(checkpoint, cast("IO[bytes]", hashing))
            # What was written ends with the length of the archive's comment, 0.
            stream.seek(-len(_LENGTH), os.SEEK_END)
            stream.write(_LENGTH + _MARK + hashing.digest().encode())
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_folder(path.parent)


class _Hashing:
    """A stream to write to that hashes all but the last bytes, the length of the comment."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._hash, self._held = stream, hashlib.sha256(), b""

    def write(self, data: Any) -> int:
        content = memoryview(data).cast("B")
        self._stream.write(content)
        held = self._held + bytes(content[-len(_LENGTH) :])
        if len(content) > len(_LENGTH):
            self._hash.update(self._held)
            self._hash.update(content[: -len(_LENGTH)])
            self._held = held[-len(_LENGTH) :]
        else:
            self._hash.update(held[: -len(_LENGTH)])
            self._held = held[-len(_LENGTH) :]
        return len(content)

    def flush(self) -> None:
        self._stream.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _written_digest(stream: IO[bytes]) -> str | None:
    size = stream.seek(0, os.SEEK_END)
    if size < _COMMENT + len(_LENGTH):
        return None
    stream.seek(size - _COMMENT - len(_LENGTH))
    end = stream.read()
    start = _LENGTH + _MARK
    return end.removeprefix(start).decode("ascii", "replace") if end.startswith(start) else None


def _sha256(stream: IO[bytes], size: int) -> str:
    found = hashlib.sha256()
    stream.seek(0)
    while size and (data := stream.read(min(size, _CHUNK))):
        found.update(data)
        size -= len(data)
    return found.hexdigest()


def check_file(path: Path) -> None:
    """Compare a file with the digest that it holds; one of another program with its archive's checksums.

    Raises:
        DamagedError: they differ, or it is no checkpoint.
    """
    try:
        with path.open("rb") as stream:
            written = _written_digest(stream)
            if written is not None:
                size = stream.seek(0, os.SEEK_END) - _COMMENT - len(_LENGTH)
                if _sha256(stream, size) != written:
                    raise DamagedError("its checksum differs")
                return
            if not stream.seek(0, os.SEEK_END):
                raise DamagedError("it is empty")
            try:
                with zipfile.ZipFile(stream) as archive:
                    if (name := archive.testzip()) is not None:
                        raise DamagedError(f"the checksum of {name} in it differs")
            except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
                raise DamagedError("it is cut off, or no checkpoint") from error
    except OSError as error:
        raise DamagedError(f"it can't be read: {error.strerror or error}") from error


def file_digest(path: Path) -> str:
    """What a file's content is called by; of a file that was written here without reading it."""
    with path.open("rb") as stream:
        return _written_digest(stream) or _sha256(stream, stream.seek(0, os.SEEK_END))


def load_file(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A checked file's content, on the CPU, where nothing of it is run.

    Raises:
        DamagedError: it holds something else than a checkpoint.
    """
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # whatever unpickling foreign bytes raises
        raise DamagedError("it holds something else than tensors and plain values") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise DamagedError("it holds no state_dict")
    return checkpoint
