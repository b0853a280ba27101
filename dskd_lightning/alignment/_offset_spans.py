"""Byte spans from character offsets, for tokens that do not spell the text they were made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dskd_lightning.alignment.token_bytes import TokenBytes

__all__ = ["offset_ends"]

_SPACE = 0x20
_MARKER = "\u2581"  # SentencePiece's


def offset_ends(
    table: TokenBytes,
    text: str,
    data: bytes,
    ids: list[int],
    unknown: npt.NDArray[np.bool_],
    added: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.int32], bool]:
    """Where each token ends in ``data``, and whether the tokenizer changed the text.

    ``unknown`` and ``added`` ``[tokens]`` are filled in.
    """
    code = table.tracer.encode(text, add_special_tokens=False)
    traced: list[int] = code.ids
    lead = 0
    while lead < len(ids) and ids[lead] in table.special and ids[lead : lead + len(traced)] != traced:
        lead += 1
    stop = lead + len(traced)
    if ids[lead:stop] != traced or not table.special.issuperset(ids[stop:]):
        return _agreeing_ends(table, data, ids, unknown), False
    added[:lead], added[stop:] = True, True
    ends = np.zeros(len(ids), np.int32)
    if not traced:
        return ends, False
    inside = _resolve(table, text, data, traced, np.array(code.offsets, np.int64))
    ends[lead:stop], ends[stop:] = inside, inside[-1]
    unknown[lead:stop] = _unknown(table, data, traced, inside)
    normalized = _differs(table, data, traced, inside, unknown[lead:stop])
    unknown[lead:stop] |= _misplaced(table, data, traced, inside)
    return ends, normalized


def _resolve(
    table: TokenBytes, text: str, data: bytes, ids: list[int], offsets: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Offsets ``[tokens, 2]`` in characters, which overlap inside a character, to ends in bytes."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    byte_of = np.concatenate(([0], np.cumsum(widths)))
    starts, ends = byte_of[offsets[:, 0]], byte_of[offsets[:, 1]]

    # Tokens that share a character form a cluster, whose outer borders are certain.
    reached = np.maximum.accumulate(ends)
    opens = np.concatenate(([True], starts[1:] >= reached[:-1]))
    first = np.flatnonzero(opens)
    cluster = np.cumsum(opens) - 1
    last = np.append(first[1:], len(ids)) - 1
    low, high = starts[first], reached[last]

    # Dropped text: whitespace goes to the cluster after it, anything else to the one before.
    blank = byte_of[[i for i, char in enumerate(text) if char.isspace()]]
    blank = np.append(blank, len(data))
    border = np.minimum(blank[np.searchsorted(blank, high)], np.append(low[1:], len(data)))
    border = np.maximum(border, high)

    # Inside a cluster the pieces' lengths decide, if they fill it; else it stays one lump.
    lengths = table.lengths[ids].astype(np.int64)
    total, width = np.add.reduceat(lengths, first), high - low
    view = np.frombuffer(data, np.uint8)
    marked = np.array([table.pieces[ids[i]][:1] == b" " for i in first]) & (total == width + 1)
    marked &= view[np.minimum(low, len(data) - 1)] != _SPACE
    lengths[first[marked]] -= 1
    exact = (total == width) | marked
    for i in np.flatnonzero(exact & (last > first)).tolist():
        spelled = b"".join(table.pieces[index] for index in ids[first[i] : last[i] + 1])
        exact[i] = spelled[int(marked[i]) :] == data[low[i] : high[i]]
    running = np.cumsum(lengths)
    inside = running - (running - lengths)[first][cluster] + low[cluster]
    resolved = np.where(exact[cluster], inside, np.append(0, border[:-1])[cluster])
    resolved[last] = border
    return resolved


def _unknown(
    table: TokenBytes, data: bytes, ids: list[int], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """``[tokens]``: the unknown token, but where the text holds its own string."""
    lost = np.asarray(ids, np.int64) == table.unknown
    for i in np.flatnonzero(lost).tolist():
        start = int(ends[i - 1]) if i else 0
        lost[i] = data[start : int(ends[i])] != table.pieces[table.unknown]
    return lost


def _misplaced(
    table: TokenBytes, data: bytes, ids: list[int], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """``[tokens]``: tokens that are not what the tokenizer's normaliser makes of the bytes they cover.

    Offsets are wrong at times, and markers take bytes. Whitespace aside, which tokenizers move;
    tokens without bytes are judged together with the next token that has some.
    """
    wrong = np.zeros(len(ids), np.bool_)
    normalizer, begin, start = table.tracer.normalizer, 0, 0
    for i, end in enumerate(ends.tolist()):
        if end == start and i + 1 < len(ids):
            continue
        covered = data[start:end]
        pieces = b"".join(map(table.pieces.__getitem__, ids[begin : i + 1]))
        wrong[begin : i + 1] = not (
            _dense(pieces) == _dense(covered)
            or (normalizer is not None and _dense(pieces) == _dense(_normalized(normalizer, covered)))
        )
        begin, start = i + 1, end
    return wrong


def _normalized(normalizer: Any, covered: bytes) -> bytes:
    try:
        text: str = normalizer.normalize_str(covered.decode())
    except UnicodeDecodeError:
        return covered  # a part of a character is no text
    return text.encode()


def _dense(data: bytes) -> bytes:
    """Without whitespace and the marker that stands for it."""
    return "".join(data.decode(errors="surrogateescape").replace(_MARKER, " ").split()).encode(
        errors="surrogateescape"
    )


def _differs(
    table: TokenBytes,
    data: bytes,
    ids: list[int],
    ends: npt.NDArray[np.int64],
    unknown: npt.NDArray[np.bool_],
) -> bool:
    """Whether the known tokens spell anything but the bytes they cover, spaces aside."""
    known = np.repeat(~unknown, np.diff(ends, prepend=0))
    covered = np.frombuffer(data, np.uint8)[: len(known)][known].tobytes()
    pieces = [table.pieces[index] for index, lost in zip(ids, unknown.tolist(), strict=True) if not lost]
    return covered.replace(b" ", b"") != b"".join(pieces).replace(b" ", b"")


def _agreeing_ends(
    table: TokenBytes, data: bytes, ids: list[int], unknown: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int32]:
    """Ends of tokens that are no tokenisation of the text: exact while the bytes agree, then unknown."""
    ends, position = np.zeros(len(ids), np.int32), 0
    for i, index in enumerate(ids):
        piece = table.pieces[index]
        if not data.startswith(piece, position):
            unknown[i:] = True
            ends[i:] = position
            return ends
        position += len(piece)
        ends[i] = position
    return ends
