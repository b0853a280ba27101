"""Which bytes of a text each token covers, exact inside multi-byte characters.

A tokenizer whose tokens spell the text (byte-level BPE, SentencePiece with byte fallback) needs
no offsets: the tokens' bytes are looked up by id, compared with the text as a whole, and their
running lengths are the spans. Only where the comparison fails (normalisers, dropped whitespace,
unknown tokens) are the tokenizer's character offsets read, see `_offset_spans`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dskd_lightning.alignment._offset_spans import offset_ends
from dskd_lightning.alignment.token_bytes import TokenBytes, token_bytes
from dskd_lightning.tokenizers import encoded, sanitize_text

__all__ = ["ByteSpans", "batch_byte_spans", "response_byte_spans", "token_byte_spans"]

_YES, _NO = np.ones(1, np.bool_), np.zeros(1, np.bool_)


@dataclass(frozen=True)
class ByteSpans:
    """Byte spans of the tokens of one text, in the UTF-8 bytes of the text *as it was given*.

    Spans follow each other without holes: ``starts[0] == 0`` and ``starts[i] == ends[i - 1]``.
    Where a tokenizer drops whitespace, the token after it covers it, as ``" the"`` would; other
    dropped characters (stripped accents, controls) belong to the token before them. Both sides
    of an alignment thus share one coordinate, even if one of them reads a normalised form.

    Args:
        starts: ``[tokens]`` int32, first byte.
        ends: ``[tokens]`` int32, one past the last byte; equal to ``starts`` for tokens that
            cover no byte, such as a prepended space marker.
        unknown: ``[tokens]`` bool, tokens that do not stand for the bytes they cover.
        added: ``[tokens]`` bool, special tokens that are not in the text (bos, eos, ...).
        end: ``[tokens]`` bool, the token that ends the sequence or turn; at most one, the last.
        length: bytes of the text. Bytes from ``ends[-1]`` on are covered by no token.
        normalized: the tokenizer reads another form of the text (case, accents, NFC, ...): spans
            are that form's, mapped back to the given text by the tokenizer's offsets.
    """

    starts: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]
    unknown: npt.NDArray[np.bool_]
    added: npt.NDArray[np.bool_]
    end: npt.NDArray[np.bool_]
    length: int
    normalized: bool = False

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def unaligned_bytes(self) -> int:
        """Bytes that no known token covers: those of unknown tokens and dropped ones at the end."""
        covered = int(self.ends[-1]) if len(self.ends) else 0
        return int((self.ends - self.starts)[self.unknown].sum()) + self.length - covered

    def with_end(self) -> ByteSpans:
        """The same spans and one end-of-sequence token after them."""
        last = self.ends[-1:] if len(self.ends) else np.zeros(1, np.int32)
        return ByteSpans(
            np.concatenate((self.starts, last)),
            np.concatenate((self.ends, last)),
            np.concatenate((self.unknown, _NO)),
            np.concatenate((self.added, _YES)),
            np.concatenate((self.end, _YES)),
            self.length,
            self.normalized,
        )

    def window(self, start: int, end: int) -> tuple[slice, ByteSpans]:
        """Tokens that cover bytes of ``[start, end)``, relative to ``start``, and which they are.

        A token across the border is clipped to the bytes inside. An added or special token right
        behind ``end`` is not part of the window.
        """
        first = int(np.searchsorted(self.ends, start, "right"))
        last = int(np.searchsorted(self.starts, end, "left"))
        kept = slice(first, max(first, last))
        return kept, ByteSpans(
            (np.clip(self.starts[kept], start, end) - start).astype(np.int32),
            (np.clip(self.ends[kept], start, end) - start).astype(np.int32),
            self.unknown[kept],
            self.added[kept],
            self.end[kept],
            end - start,
            self.normalized,
        )


def token_byte_spans(
    tokenizer: Any,
    text: str,
    ids: Sequence[int] | None = None,
    end_ids: Collection[int] | None = None,
) -> ByteSpans:
    """Byte spans of the tokens of ``text``.

    Args:
        tokenizer: a fast tokenizer, of transformers or of tokenizers.
        text: lone surrogates count as U+FFFD, see `sanitize_text`.
        ids: the tokens, if they are known already; special tokens at either end that are not in
            the text cover no byte. Ids that are no tokenisation of the text (as a model may
            sample them) are aligned as far as their bytes agree, the rest is unknown.
        end_ids: ids that end a sequence; None for the tokenizer's eos token.

    Raises:
        UserError: the tokenizer is a slow one.
    """
    table = token_bytes(tokenizer)
    text = sanitize_text(text)
    if ids is None:
        ids = table.tracer.encode(text, add_special_tokens=False).ids
    return _spans(table, text, _as_list(ids), _end_ids(tokenizer) if end_ids is None else end_ids)


def batch_byte_spans(
    tokenizer: Any,
    texts: Sequence[str],
    ids: Sequence[Sequence[int]] | None = None,
    end_ids: Collection[int] | None = None,
) -> list[ByteSpans]:
    """`token_byte_spans` of many texts, tokenised in parallel where ``ids`` is None."""
    table = token_bytes(tokenizer)
    texts = [sanitize_text(text) for text in texts]
    if ids is None:
        ids = encoded(table.tracer, texts)
    ends = _end_ids(tokenizer) if end_ids is None else end_ids
    return [_spans(table, text, _as_list(row), ends) for text, row in zip(texts, ids, strict=True)]


def response_byte_spans(
    tokenizer: Any,
    text: str,
    start: int,
    end: int,
    ids: Sequence[int] | None = None,
    end_ids: Collection[int] | None = None,
) -> tuple[slice, ByteSpans]:
    """Spans of a response inside a rendered conversation that was tokenised as a whole.

    Args:
        tokenizer: a fast tokenizer.
        text: prompt and response with all template tokens.
        start: character at which the response starts.
        end: character after its last.
        ids: the tokens of ``text``; None tokenises it without adding special tokens.
        end_ids: ids that end a turn; None takes any special token that follows the response.

    Returns:
        The response's tokens as a slice of the tokens, with the token that ends the turn, and
        their spans relative to the response's first byte.
    """
    table = token_bytes(tokenizer)
    if ids is None:
        ids = table.tracer.encode(sanitize_text(text), add_special_tokens=False).ids
    ids = _as_list(ids)
    first = len(sanitize_text(text[:start]).encode())
    last = first + len(sanitize_text(text[start:end]).encode())
    kept, spans = token_byte_spans(tokenizer, text, ids, ()).window(first, last)
    closing = table.special if end_ids is None else end_ids
    if kept.stop < len(ids) and ids[kept.stop] in closing:
        return slice(kept.start, kept.stop + 1), spans.with_end()
    return kept, spans


def _as_list(ids: Sequence[int]) -> list[int]:
    return ids if isinstance(ids, list) else np.asarray(ids, np.int64).tolist()


def _end_ids(tokenizer: Any) -> tuple[int, ...]:
    eos = getattr(tokenizer, "eos_token_id", None)
    return () if eos is None else (eos,)


def _spans(table: TokenBytes, text: str, ids: list[int], end_ids: Collection[int]) -> ByteSpans:
    data = text.encode()
    count = len(ids)
    unknown, added, end = np.zeros(count, np.bool_), np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    lengths = table.lengths[np.asarray(ids, np.int64)]
    joined = b"".join(map(table.pieces.__getitem__, ids))
    normalized = False
    if joined != data and ids and ids[-1] in end_ids:
        body = joined[: len(joined) - int(lengths[-1])]
        if data == (body if len(body) == len(data) else body.removeprefix(b" ")):
            joined, lengths[-1], added[-1] = body, 0, True
    if joined != data and joined[:1] == b" " and joined[1:] == data:
        joined, lengths[0] = data, lengths[0] - 1
    if joined == data:
        ends = np.cumsum(lengths, dtype=np.int32)
    elif (sections := _sections(table, data, ids, lengths, added)) is not None:
        ends = sections
    else:
        ends, normalized = offset_ends(table, text, data, ids, unknown, added)
    starts = np.concatenate((np.zeros(min(count, 1), np.int32), ends[:-1]))
    if count and added[-1] and ids[-1] in end_ids:
        end[-1] = True
    unknown &= ~end
    return ByteSpans(starts, ends, unknown, added, end, len(data), normalized)


def _sections(
    table: TokenBytes,
    data: bytes,
    ids: list[int],
    lengths: npt.NDArray[np.int32],
    added: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int32] | None:
    """Ends where added tokens cut the text, each cut with a space marker of its own; None if that fails.

    ``lengths`` and ``added`` change only on success.
    """
    cuts = [i for i, index in enumerate(ids) if index in table.added]
    if not cuts:
        return None
    changed, absent, position, begin = lengths.copy(), added.copy(), 0, 0
    for cut in [*cuts, len(ids)]:
        if cut > begin:
            section = b"".join(map(table.pieces.__getitem__, ids[begin:cut]))
            if not data.startswith(section, position):
                if section[:1] != b" " or not data.startswith(section[1:], position):
                    return None
                section, changed[begin] = section[1:], changed[begin] - 1
            position += len(section)
        if cut < len(ids):
            piece = table.pieces[ids[cut]]
            if not data.startswith(piece, position):
                if ids[cut] not in table.special or ids[cut] == table.unknown:
                    return None
                absent[cut], changed[cut], piece = True, 0, b""
            position += len(piece)
            begin = cut + 1
    if position != len(data):
        return None
    lengths[:], added[:] = changed, absent
    return np.cumsum(changed, dtype=np.int32)
