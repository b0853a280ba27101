"""Shards: safetensors files that are whole or absent, and say when they are damaged."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.files import replacing

__all__ = ["check_shard", "open_shard", "shard_name", "write_shard"]

_NOTE = "teacher_cache"
_READ_BYTES = 8 * 2**20
_HEADER_BYTES = 8  # safetensors: the header's length as a little-endian 64-bit integer


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor], key: str) -> None:
    """Write a shard beside its place, flush it, and move it there.

    Args:
        path: the shard's file.
        tensors: contiguous tensors.
        key: of the cache that it belongs to.

    Raises:
        UserError: the disk is full or can't be written.
    """
    checksums = {name: zlib.crc32(_content(tensor)) for name, tensor in tensors.items()}
    note = json.dumps({"key": key, "crc32": checksums})
    try:
        with replacing(path) as temporary:
            save_file(dict(tensors), temporary, {_NOTE: note})  # one entry: their order would be random
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"Can't write the teacher cache shard '{path}' ({error}): free space, or set "
            "`teacher_cache.folder` to another disk."
        ) from error


def open_shard(path: Path) -> dict[str, Tensor]:
    """The shard's tensors, memory-mapped.

    Raises:
        UserError: the file is absent, cut off or no shard.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def check_shard(path: Path, key: str, *, content: bool) -> None:
    """Check that a shard is whole and belongs to the cache ``key``.

    Args:
        path: the shard's file.
        key: of the cache.
        content: also read all of it and compare its checksum.

    Raises:
        UserError: it is damaged, and how to replace it.
    """
    try:
        with safe_open(path, "pt") as file:
            note = json.loads((file.metadata() or {}).get(_NOTE, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if note.get("key") != key:
        raise _damaged(path, "it belongs to another cache")
    if content and note.get("crc32") != _checksums(path):
        raise _damaged(path, "its checksum differs")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"The teacher cache shard '{path}' is damaged ({reason}): delete that file and start again, "
        "which computes it anew."
    )


def _content(tensor: Tensor) -> memoryview:
    content: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(content)


def _checksums(path: Path) -> dict[str, int]:
    """CRC-32 of each tensor; read through, not mapped, so that resident memory stays small."""
    found = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_BYTES), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            start, stop = tensor["data_offsets"]
            file.seek(_HEADER_BYTES + length + start)
            found[name], left = 0, stop - start
            while left and (block := file.read(min(left, _READ_BYTES))):
                found[name], left = zlib.crc32(block, found[name]), left - len(block)
    return found
