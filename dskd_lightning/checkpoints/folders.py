"""Checkpoint folders, which sharded runs write with `torch.distributed.checkpoint`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

from dskd_lightning.checkpoints.files import DamagedError, sync_folder
from dskd_lightning.ranks import barrier, gathered, rank_and_world

__all__ = [
    "check_folder",
    "folder_digest",
    "load_folder",
    "restored",
    "tensor_names",
    "tensors_of",
    "write_folder",
]

_DIGESTS = "digests.json"
_METADATA, _REST = ".metadata", "meta.pt"
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}  # fmt: skip
"""What a folder's index may be made of, beside PyTorch's data types."""


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let all ranks ``write`` into a folder beside ``path``, which then takes its place.

    The place is empty for a moment, in which `restored` finds the old folder.
    """
    part, old = path.parent / f".{path.name}.part", _old(path)
    first = rank_and_world()[0] == 0
    if first:
        restored(path)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    barrier()
    write(part)
    barrier()
    if first:
        digests = {file.name: _sha256(file) for file in sorted(part.iterdir())}
        (part / _DIGESTS).write_text(json.dumps(digests, indent=1) + "\n")
        for file in part.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(part)
        _replace(part, path)
        sync_folder(path.parent)
        _remove(old)
    barrier()


def _replace(part: Path, path: Path) -> None:
    old = _old(path)
    while True:
        _remove(old)
        if path.exists():
            path.rename(old)
        try:
            part.rename(path)
            return
        except OSError:
            if not path.exists():  # else a reader has `restored` the old one meanwhile
                raise


def restored(path: Path) -> Path:
    """The path; a folder that a kill found in the midst of being replaced is put back there."""
    if not path.exists() and _old(path).exists():
        with contextlib.suppress(FileNotFoundError, OSError):  # another rank was faster
            _old(path).rename(path)
    return path


def _old(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_digest(path: Path) -> str:
    """What a folder's content is called by."""
    listed = path / _DIGESTS
    return _sha256(listed if listed.is_file() else path / _METADATA)


def check_folder(path: Path) -> None:
    """Compare a folder's files with their digests, and look whether reading it would run code.

    Where there are more ranks, all call, and each reads its share.

    Raises:
        DamagedError: a digest differs, a file is missing, or pickles hold more than data.
    """
    rank, world = rank_and_world()
    faults = gathered(_fault(path, rank, world))
    if found := next((fault for fault in faults if fault), None):
        raise DamagedError(found)


def _fault(path: Path, rank: int, world: int) -> str | None:
    try:
        listed = path / _DIGESTS
        digests = json.loads(listed.read_bytes()) if listed.is_file() else {}
        for name in sorted(digests)[rank::world]:
            if _sha256(path / Path(name).name) != digests[name]:
                return f"the checksum of {name} differs"
        reader = _Reader(path)
        metadata = reader.read_metadata()
        load_rest(path)
        places = metadata.storage_data
        blobs = [i for i in places if isinstance(metadata.state_dict_metadata[i.fqn], BytesStorageMetadata)]
        for index in blobs[rank::world]:
            place = places[index]
            with (path / place.relative_path).open("rb") as stream:
                stream.seek(place.offset)
                _plain(io.BytesIO(stream.read(place.length)))
    except DamagedError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or path).name} can't be read: {error.strerror}"
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        return f"its index is malformed: {type(error).__name__}"
    return None


def _plain(stream: Any) -> Any:
    """What a pickle holds, where that is data."""
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever unpickling foreign bytes raises
        raise DamagedError("it holds something else than tensors and plain values") from error


def load_rest(path: Path) -> dict[str, Any]:
    """What a folder holds beside weights and optimiser states.

    Raises:
        DamagedError: that isn't data.
    """
    rest = _plain(path / _REST)
    if not isinstance(rest, dict):
        raise DamagedError(f"{_REST} in it is malformed")
    return rest


def tensor_names(path: Path) -> list[str]:
    """Names of the module's tensors in a folder.

    Raises:
        DamagedError: its index isn't one.
    """
    keys = _Reader(path).read_metadata().state_dict_metadata
    return [key.removeprefix("state_dict.") for key in keys if key.startswith("state_dict.")]


def load_folder(path: Path) -> dict[str, Any]:
    """A folder's weights, whole, and the rest but for the optimiser's states, on one process.

    Raises:
        DamagedError: its index isn't one, or it holds something else than data.
    """
    return {**load_rest(path), "state_dict": tensors_of(path, "state_dict.")}


def tensors_of(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a folder whose keys begin with ``prefix``, whole, without it.

    Raises:
        DamagedError: the folder's index isn't one.
    """
    found = _Reader(path).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in found.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=_Reader(path), planner=DefaultLoadPlanner(), no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


class _Reader(FileSystemReader):
    """Whose index is unpickled without running anything."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        try:
            with (Path(self.path) / _METADATA).open("rb") as stream:
                metadata = _Unpickler(stream).load()
        except OSError:
            raise
        except Exception as error:  # whatever unpickling foreign bytes raises
            raise DamagedError(f"{_METADATA} in it is no index of a checkpoint") from error
        if not isinstance(metadata, Metadata):
            raise DamagedError(f"{_METADATA} in it is no index of a checkpoint")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
