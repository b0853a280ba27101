"""The nearest token of another vocabulary by edit distance (FuseLLM's MinED, arXiv 2401.10491)."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dskd_lightning.alignment.vocabulary import exact_token_map, vocabulary_bytes
from dskd_lightning.files import replacing
from dskd_lightning.tokenizers import tokenizer_fingerprint

__all__ = ["nearest_strings", "nearest_token_map"]

_log = logging.getLogger(__name__)
_BROKEN = (zipfile.BadZipFile, zlib.error, NotImplementedError)

_BLOCK = 1 << 26
"""Distances held at once."""


def nearest_token_map(
    source: Any, target: Any, cache_dir: str | os.PathLike[str] | None = None
) -> npt.NDArray[np.int64]:
    """``[source vocab]``: the token of ``target`` with the smallest edit distance to each token.

    Distances count bytes, markers and byte encodings undone; of equally near tokens the lowest id
    is taken. End-of-sequence tokens map to each other, other special tokens to nothing (-1).

    Args:
        source: tokenizer of the tokens to map, for MinED the teacher's.
        target: tokenizer of the tokens to map to, for MinED the student's.
        cache_dir: folder that keeps the map for next time, under the tokenizers' fingerprints.
    """
    if cache_dir is None:
        return _nearest(source, target)
    path = Path(cache_dir).expanduser() / f"nearest-{_key(source, target)}.npz"  # with a checksum
    if path.is_file():
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
                cached = archive["tokens"]
        except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, *_BROKEN) as error:
            _log.warning("The cached token map %s cannot be read (%s) and is made anew.", path, error)
        else:
            if cached.dtype == np.int64 and cached.shape == (len(vocabulary_bytes(source)),):
                return cached
            _log.warning("The cached token map %s has another shape than expected and is made anew.", path)
    mapped = _nearest(source, target)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, tokens=mapped)
    return mapped


def _key(source: Any, target: Any) -> str:
    parts = [f"{tokenizer_fingerprint(t)}:{getattr(t, 'eos_token_id', None)}" for t in (source, target)]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]


def _nearest(source: Any, target: Any) -> npt.NDArray[np.int64]:
    mapped = exact_token_map(source, target)
    pieces, others = vocabulary_bytes(source), vocabulary_bytes(target)
    left = [index for index in np.flatnonzero(mapped < 0).tolist() if pieces[index] is not None]
    candidates = [index for index, piece in enumerate(others) if piece is not None]
    if left and candidates:
        best = nearest_strings([pieces[i] or b"" for i in left], [others[i] or b"" for i in candidates])
        mapped[left] = np.asarray(candidates, np.int64)[best]
    return mapped


def nearest_strings(queries: Sequence[bytes], candidates: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """``[queries]``: index of the candidate with the smallest Levenshtein distance, the first of equals.

    Strings whose lengths differ by more than ``k`` are more than ``k`` edits apart. So candidates
    of about the query's length are tried first, and others only while nothing near was found.

    Raises:
        ValueError: there is no candidate.
    """
    if not len(candidates):
        raise ValueError("there is no candidate to be nearest")
    # One character per byte, which is what the distances count.
    texts = [[item.decode("latin-1") for item in side] for side in (queries, candidates)]
    sizes = [np.fromiter(map(len, side), np.int64, len(side)) for side in texts]
    best = np.full(len(queries), -1, np.int64)
    longest = int(max(sizes[0].max(initial=0), sizes[1].max()))
    radius = 1
    while (best < 0).any():
        for length in np.unique(sizes[0][best < 0]).tolist():
            rows = np.flatnonzero((best < 0) & (sizes[0] == length))
            near = np.flatnonzero(np.abs(sizes[1] - length) <= radius)
            if len(near):
                _search(texts, rows, near, radius, best)
        if radius > longest:
            break
        radius *= 3
    return best


def _search(
    texts: list[list[str]],
    rows: npt.NDArray[np.int64],
    near: npt.NDArray[np.int64],
    radius: int,
    best: npt.NDArray[np.int64],
) -> None:
    """Fill ``best`` where a candidate among ``near`` is at most ``radius`` edits away."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    pool = [texts[1][i] for i in near.tolist()]
    kind = np.uint8 if radius < 255 else np.int32
    step = max(1, _BLOCK // len(pool))
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        asked = [texts[0][i] for i in part.tolist()]
        cutoff = radius if kind is np.uint8 else None
        distances = cdist(asked, pool, scorer=Levenshtein.distance, dtype=kind, score_cutoff=cutoff)
        first = distances.argmin(axis=1)
        found = distances[np.arange(len(part)), first] <= radius
        best[part[found]] = near[first[found]]
