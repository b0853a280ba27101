"""Maps between the vocabularies of two tokenizers by the bytes of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dskd_lightning.alignment.byte_spans import batch_byte_spans
from dskd_lightning.alignment.token_bytes import token_bytes
from dskd_lightning.tokenizers import encoded, tokenizer_fingerprint

if TYPE_CHECKING:
    pass

__all__ = [
    "PADDING_SHARE",
    "SparseProjection",
    "exact_token_map",
    "token_projection",
    "tokenizer_fingerprint",
    "vocabulary_bytes",
    "vocabulary_difference",
]

PADDING_SHARE = 0.01
"""Of a vocabulary that one side may have alone: heads are padded, Qwen's differ by 128 of 152,064."""

_ANCHORS = ("\n", ".", "a", "")
"""Texts to put before a piece, so that no marker is prepended to the piece itself."""


@dataclass(frozen=True)
class SparseProjection:
    """Nonzero entries of a matrix ``[student vocab, teacher vocab]``, sorted by row.

    Args:
        rows: ``[entries]`` int64, student ids.
        columns: ``[entries]`` int64, teacher ids.
        weights: ``[entries]`` float32, positive; each row that has any sums to 1.
        shape: sizes of the two vocabularies.
    """

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    shape: tuple[int, int]


def vocabulary_bytes(tokenizer: Any) -> list[bytes | None]:
    """Bytes of every id, space markers and byte encodings undone; None for special and unused ids."""
    table = token_bytes(tokenizer)
    hidden = table.special | {table.unknown}
    return [None if index in hidden else piece or None for index, piece in enumerate(table.pieces)]


def exact_token_map(source: Any, target: Any) -> npt.NDArray[np.int64]:
    """``[source vocab]``: the id of the same bytes in ``target``, or -1.

    End-of-sequence tokens map to each other, other special tokens to nothing. Where several ids of
    ``target`` have the same bytes (a byte token and the character it stands for), the highest is
    meant, which in SentencePiece is the character.
    """
    ids = {piece: index for index, piece in enumerate(vocabulary_bytes(target)) if piece is not None}
    pieces = vocabulary_bytes(source)
    mapped = np.array([-1 if piece is None else ids.get(piece, -1) for piece in pieces], np.int64)
    end, other_end = getattr(source, "eos_token_id", None), getattr(target, "eos_token_id", None)
    if end is not None and other_end is not None:
        mapped[end] = other_end
    return mapped


def vocabulary_difference(student: Any, teacher: Any) -> str | None:
    """Why two tokenizers are not one vocabulary, None if ids mean the same to both.

    A few tokens may be in one of them only, as newer special tokens of a family are.
    """
    ours, theirs = (
        {index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (student, teacher)
    )
    differing = [i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i)]
    clash = min((i for i in differing if i in ours and i in theirs), default=None)
    if clash is not None:
        return f"token {clash} is {ours[clash]!r} to the student and {theirs[clash]!r} to the teacher"
    if len(differing) > PADDING_SHARE * len(ours):
        return (
            f"{len(differing)} tokens of the student ({len(ours)}) and the teacher ({len(theirs)}) are in "
            "one of them only"
        )
    return None


def token_projection(student: Any, teacher: Any, decay: float = 0.5) -> SparseProjection:
    """X-Token's sparse projection of the student's vocabulary on the teacher's (arXiv 2605.21699).

    A student token with the same bytes as a teacher token has weight 1 there. Any other is cut by
    the teacher's tokenizer as it stands inside a text, and its weight spread over the pieces:
    piece ``k`` gets a share in proportion to ``decay ** k``, as the first one is what the teacher
    predicts next. Tokens that are no text by themselves (parts of a character) and special
    tokens have empty rows.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer.
        decay: 1 spreads evenly, 0 keeps the first piece alone.
    """
    exact = exact_token_map(student, teacher)
    matched = np.flatnonzero(exact >= 0)
    pieces = vocabulary_bytes(student)
    rest = [index for index in np.flatnonzero(exact < 0).tolist() if pieces[index] is not None]
    cut = _retokenize(teacher, [pieces[index] or b"" for index in rest])
    kept = [(index, ids) for index, ids in zip(rest, cut, strict=True) if ids]
    rows = np.concatenate([matched, np.repeat([i for i, _ in kept], [len(ids) for _, ids in kept])])
    columns = np.concatenate([exact[matched], *(np.asarray(ids) for _, ids in kept)])
    shares = [_shares(len(ids), decay) for _, ids in kept]
    weights = np.concatenate([np.ones(len(matched)), *shares])
    return _coalesced(rows, columns, weights, (len(pieces), len(token_bytes(teacher).pieces)))


def _shares(count: int, decay: float) -> npt.NDArray[np.float64]:
    raw = float(decay) ** np.arange(count)
    return raw / raw.sum()


def _coalesced(
    rows: npt.NDArray, columns: npt.NDArray, weights: npt.NDArray, shape: tuple[int, int]
) -> SparseProjection:
    """Sorted entries, those of one place added up ("111" cut into three times "1"), zeros left out."""
    keys, inverse = np.unique(
        rows.astype(np.int64) * shape[1] + columns.astype(np.int64), return_inverse=True
    )
    sums = np.bincount(inverse, weights, minlength=len(keys))
    keys, sums = keys[sums > 0], sums[sums > 0]
    return SparseProjection(keys // shape[1], keys % shape[1], sums.astype(np.float32), shape)


def _retokenize(tokenizer: Any, pieces: Sequence[bytes]) -> list[list[int]]:
    """Ids of each piece inside a text; empty where it is no text or the tokenizer cannot spell it."""
    found: list[list[int]] = [[] for _ in pieces]
    left: list[tuple[int, str]] = []
    for place, piece in enumerate(pieces):
        try:
            left.append((place, piece.decode()))
        except UnicodeDecodeError:
            continue
    table = token_bytes(tokenizer)
    for anchor in _ANCHORS:
        texts = [anchor + text for _, text in left]
        codes = encoded(table.tracer, texts)
        tried, left, begin = left, [], len(anchor)
        spans = batch_byte_spans(tokenizer, texts, codes, ())
        for (place, text), ids, span in zip(tried, codes, spans, strict=True):
            inside = (span.starts >= begin) & (span.ends > span.starts)
            spelled = not span.normalized and not span.unknown.any() and span.ends[-1:].sum() == span.length
            if not spelled or not inside.any() or span.starts[inside][0] != begin:
                left.append((place, text))
            else:
                found[place] = np.asarray(ids)[inside].tolist()
    return found
