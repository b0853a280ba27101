"""What a config says of the teacher cache. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CacheDtype", "TeacherCacheSettings"]

CacheDtype = Literal["bfloat16", "float32", "float16", "int8", "int4"]


@dataclass
class TeacherCacheSettings:
    """Where and how the teachers' hidden states are kept.

    Args:
        folder: of the caches, shared by all runs (and all nodes); None for ``teacher-states`` in
            the data cache.
        dtype: how states are stored. The teacher's own type loses nothing; ``int8`` takes half of
            bfloat16's bytes, ``int4`` 0.27 of them. What is lost is measured and logged.
        build: compute what is missing before training; False stops instead.
        verify: check every shard's checksum before training.
        tokens_per_batch: most tokens of a batch of the teacher while building, padding included.
    """

    folder: str | None = None
    dtype: CacheDtype = "bfloat16"
    build: bool = True
    verify: bool = True
    tokens_per_batch: int = 4096
