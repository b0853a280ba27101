"""Reads a complete cache."""

from __future__ import annotations

import io
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.teacher_cache.codecs import decode, stored_width
from dskd_lightning.teacher_cache.manifest import Layout, Manifest
from dskd_lightning.teacher_cache.shards import check_shard, open_shard, shard_name

__all__ = ["ShardStore", "TeacherStates", "is_complete", "read_layout"]

_T = TypeVar("_T")


def read_layout(folder: Path, manifest: Manifest) -> Layout:
    """The layout of a cache folder.

    Raises:
        UserError: its index is absent or damaged.
    """
    path = folder / "tokens.npy"
    try:
        content = path.read_bytes()
        if manifest.index_crc32 not in (None, zlib.crc32(content)):
            raise ValueError("its checksum differs")
        return Layout(np.load(io.BytesIO(content)), manifest.shard_tokens)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise UserError(
            f"The teacher cache index '{path}' is damaged ({error}): delete the folder '{folder}', which "
            "computes it anew."
        ) from error


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds a cache with all its shards (their content isn't looked at)."""
    manifest = Manifest.read(folder)
    return manifest is not None and not read_layout(folder, manifest).missing(folder)


class ShardStore(ABC, Generic[_T]):
    """What a complete cache holds of each example, memory-mapped; a `TeacherHidden`.

    Args:
        folder: of the cache.

    Raises:
        UserError: there is none, or its index is damaged.
    """

    main: str
    """Name of the tensor ``[tokens, width]`` of every shard."""

    def __init__(self, folder: Path) -> None:
        manifest = Manifest.read(folder)
        if manifest is None:
            raise UserError(f"'{folder}' holds no teacher cache: make one with `dskd cache`.")
        self.folder, self.manifest = folder, manifest
        self.layout = read_layout(folder, manifest)
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # each worker maps the files itself

    def verify(self, *, content: bool = True, rank: int = 0, ranks: int = 1) -> None:
        """Check every shard, or this rank's share of them.

        Args:
            content: also compare checksums, which reads everything.
            rank: this process's.
            ranks: number of processes that share the work.

        Raises:
            UserError: a shard is absent or damaged.
        """
        for shard in range(rank, self.layout.shards, ranks):
            path = self.folder / shard_name(shard)
            check_shard(path, self.manifest.key, content=content)
            shape = tuple(open_shard(path)[self.main].shape)
            if shape != (self.layout.tokens(shard), self.width):
                raise UserError(f"The teacher cache shard '{path}' has the wrong size: delete that file.")

    @property
    def width(self) -> int:
        """Columns of that tensor."""
        return self.manifest.hidden_size

    @abstractmethod
    def read(self, shard: dict[str, Tensor], rows: slice) -> _T:
        """What the tensors of a shard hold in ``rows``."""

    def get(self, examples: Sequence[int]) -> list[_T]:
        """What is kept of each example's response positions."""
        found = []
        for example in examples:
            shard, rows = self.layout.place(example)
            if shard not in self._shards:
                self._shards[shard] = open_shard(self.folder / shard_name(shard))
            found.append(self.read(self._shards[shard], rows))
        return found


class TeacherStates(ShardStore[Tensor]):
    """A teacher's last hidden states at response positions, in its own type."""

    main = "hidden"

    @property
    def width(self) -> int:
        return stored_width(self.manifest.hidden_size, self.manifest.dtype)

    def read(self, shard: dict[str, Tensor], rows: slice) -> Tensor:
        """Hidden states ``[m, hidden]`` of ``rows``."""
        return decode(shard, rows, getattr(torch, self.manifest.teacher_dtype))
