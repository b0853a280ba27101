"""What a cache folder says of itself: what it was computed from, and where each example lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object, write_object
from dskd_lightning.models.teacher_cache_settings import CacheDtype
from dskd_lightning.teacher_cache.shards import shard_name

__all__ = ["Layout", "Manifest", "cache_key", "differing_parts"]

_Counts = npt.NDArray[np.int64]
_TEACHER_DTYPES = ("float16", "bfloat16", "float32", "float64")


def cache_key(parts: Mapping[str, str]) -> str:
    """Name of the cache with these ``parts``: what its content depends on, by readable names."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()[:32]


def differing_parts(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names of the parts that differ."""
    return [name for name in dict.fromkeys((*one, *other)) if one.get(name) != other.get(name)]


@dataclass(frozen=True)
class Manifest:
    """Written first, before any shard.

    Args:
        parts: what the cache depends on; their hash is the folder's name.
        hidden_size: of the teacher.
        dtype: how states are stored.
        teacher_dtype: what they are read as.
        shard_tokens: most response tokens of a shard, unless one example has more.
        weights: `weights_fingerprint` of the loaded teacher.
        head: fingerprint of its head and embeddings, which training loads alone.
        notes: for people: the source, lengths, versions.
        index_crc32: checksum of ``tokens.npy``; None in caches of old versions.
    """

    parts: dict[str, str]
    hidden_size: int
    dtype: CacheDtype
    teacher_dtype: str
    shard_tokens: int
    weights: str
    head: str
    notes: dict[str, str] = field(default_factory=dict)
    index_crc32: int | None = None

    def __post_init__(self) -> None:
        texts = (self.teacher_dtype, self.dtype, self.weights, self.head, *self.parts.values())
        if not isinstance(self.parts, dict) or not all(isinstance(text, str) for text in texts):
            raise TypeError("its parts, types and fingerprints must be text")
        if self.dtype not in get_args(CacheDtype) or self.teacher_dtype not in _TEACHER_DTYPES:
            raise ValueError(f"there is no type {self.dtype!r} or {self.teacher_dtype!r}")
        if not all(type(count) is int and count > 0 for count in (self.hidden_size, self.shard_tokens)):
            raise ValueError("sizes must be positive integers")

    @property
    def key(self) -> str:
        return cache_key(self.parts)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of ``folder``, or None where there is none.

        Raises:
            UserError: it is damaged.
        """
        path = folder / "manifest.json"
        if not path.is_file():
            return None
        values = read_object(path, f"delete '{folder}'")
        try:
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"'{path}' is no manifest of a teacher cache ({error}): delete '{folder}'."
            ) from error

    @classmethod
    def nearest(cls, roots: Iterable[Path], parts: Mapping[str, str]) -> Manifest | None:
        """Of the caches in these folders the one that differs in fewest parts; None where there is none."""
        folders = (folder for root in roots for folder in sorted(root.glob("*/")))
        found = [manifest for folder in folders if (manifest := cls.read(folder)) is not None]
        return min(found, key=lambda manifest: len(differing_parts(parts, manifest.parts)), default=None)

    def write(self, folder: Path) -> None:
        """Write it atomically."""
        write_object(folder / "manifest.json", asdict(self), indent=1)


class Layout:
    """Which rows of which shard hold which example.

    Args:
        tokens: ``[examples]``, response tokens of each.
        shard_tokens: most tokens of a shard; one example is never split.
    """

    def __init__(self, tokens: npt.NDArray[np.integer], shard_tokens: int) -> None:
        self.ends: _Counts = np.cumsum(tokens, dtype=np.int64)
        firsts = [0]
        start = 0
        while firsts[-1] < len(tokens):
            stop = int(np.searchsorted(self.ends, start + shard_tokens, side="right"))
            firsts.append(max(stop, firsts[-1] + 1))
            start = int(self.ends[firsts[-1] - 1])
        self.firsts: _Counts = np.array(firsts, np.int64)

    @property
    def shards(self) -> int:
        return len(self.firsts) - 1

    @property
    def total(self) -> int:
        """Response tokens of all examples."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def examples(self, shard: int) -> range:
        """Examples of a shard."""
        return range(int(self.firsts[shard]), int(self.firsts[shard + 1]))

    def tokens(self, shard: int) -> int:
        """Response tokens of a shard."""
        return self._end(int(self.firsts[shard + 1]) - 1) - self._end(int(self.firsts[shard]) - 1)

    def counts(self, shard: int) -> _Counts:
        """``[examples]`` of a shard, response tokens of each; 0 where the teacher doesn't answer."""
        examples = self.examples(shard)
        return np.diff(self.ends[examples.start : examples.stop], prepend=self._end(examples.start - 1))

    def count(self, example: int) -> int:
        """Response tokens of an example."""
        return self._end(example) - self._end(example - 1)

    def place(self, example: int) -> tuple[int, slice]:
        """Shard of an example and its rows in it."""
        shard = int(np.searchsorted(self.firsts, example, side="right")) - 1
        before = self._end(int(self.firsts[shard]) - 1)
        return shard, slice(self._end(example - 1) - before, self._end(example) - before)

    def missing(self, folder: Path) -> list[int]:
        """Shards that aren't in ``folder``."""
        return [shard for shard in range(self.shards) if not (folder / shard_name(shard)).is_file()]

    def _end(self, example: int) -> int:
        return int(self.ends[example]) if example >= 0 else 0
