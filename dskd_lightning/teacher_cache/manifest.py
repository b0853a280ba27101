"""What a cache folder says of itself: what it was computed from, and where each example lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dskd_lightning.errors import UserError
from dskd_lightning.files import write_atomic
from dskd_lightning.models.teacher_cache_settings import CacheDtype
from dskd_lightning.teacher_cache.shards import shard_name

__all__ = ["Layout", "Manifest", "cache_key", "differing_parts"]

_Counts = npt.NDArray[np.int64]
VERSION = "1"


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
    """

    parts: dict[str, str]
    hidden_size: int
    dtype: CacheDtype
    teacher_dtype: str
    shard_tokens: int
    weights: str
    head: str
    notes: dict[str, str] = field(default_factory=dict)

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
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"'{path}' is no manifest of a teacher cache ({error}): delete '{folder}'."
            ) from error

    def write(self, folder: Path) -> None:
        """Write it atomically."""
        write_atomic(folder / "manifest.json", json.dumps(asdict(self), indent=1) + "\n")


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
