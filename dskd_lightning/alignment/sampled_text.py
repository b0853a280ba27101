"""The text of sampled token ids, and which of its bytes each of them covers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dskd_lightning.alignment.byte_spans import ByteSpans
from dskd_lightning.alignment.token_bytes import TokenBytes, token_bytes

__all__ = ["sampled_text"]


def sampled_text(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ByteSpans]:
    """What a model wrote, without tokenising it again: that could give ids that it never chose.

    The text is that of the ids' own bytes. Bytes that are no UTF-8 (a response that ended inside a
    character, say) are left out of it, as are special tokens and the space marker that a tokenizer
    puts in front of every text.

    Args:
        tokenizer: a fast tokenizer, of transformers or of tokenizers.
        ids: the sampled tokens, without the one that ended the response.

    Returns:
        The text, and spans over its bytes. A token of which some bytes were left out is ``unknown``, one of
        which all were is ``added``.
    """
    table = token_bytes(tokenizer)
    pieces = [_piece(table, index) for index in ids]
    first = next((at for at, piece in enumerate(pieces) if piece), None)
    absent = np.array([not piece for piece in pieces], np.bool_)
    if first is not None and pieces[first][:1] == b" " and _prepends_space(table):
        pieces[first] = pieces[first][1:]
    data = b"".join(pieces)
    valid = _valid_utf8(data)
    before = np.concatenate(([0], np.cumsum(valid)))
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    first_byte, last_byte = before[starts].astype(np.int32), before[ends].astype(np.int32)
    kept = last_byte - first_byte
    text = bytes(np.frombuffer(data, np.uint8)[valid]).decode()
    spans = ByteSpans(
        starts=first_byte,
        ends=last_byte,
        unknown=(kept > 0) & (kept < lengths),
        added=absent | ((kept == 0) & (lengths > 0)),
        end=np.zeros(len(pieces), np.bool_),
        length=int(before[-1]),
    )
    return text, spans


def _piece(table: TokenBytes, index: int) -> bytes:
    if index >= len(table.pieces) or index in table.special or index == table.unknown:
        return b""
    return table.pieces[index]


def _prepends_space(table: TokenBytes) -> bool:
    ids = table.tracer.encode("a", add_special_tokens=False).ids
    return b"".join(map(table.pieces.__getitem__, ids)) == b" a"


def _valid_utf8(data: bytes) -> np.ndarray:
    """``[bytes]`` bool, which of them belong to whole characters."""
    valid, position = np.ones(len(data), np.bool_), 0
    while True:
        try:
            data[position:].decode()
            return valid
        except UnicodeDecodeError as error:
            valid[position + error.start : position + error.end] = False
            position += error.end
