"""Sampled ids become text and byte spans without being tokenised again."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_tokenizers import TRAINED, tokenizer_named

from dskd_lightning.alignment.byte_spans import token_byte_spans
from dskd_lightning.alignment.sampled_text import sampled_text
from dskd_lightning.alignment.token_bytes import token_bytes

named = functools.cache(tokenizer_named)


def whole_characters(data: bytes) -> list[bool]:
    """Which bytes belong to a whole character: one character tried after another, byte by byte."""
    kept, at = [], 0
    while at < len(data):
        for size in (1, 2, 3, 4):
            try:
                assert len(data[at : at + size].decode()) == 1
            except (UnicodeDecodeError, AssertionError):
                continue
            kept += [True] * size
            at += size
            break
        else:
            kept.append(False)
            at += 1
    return kept


@pytest.mark.parametrize("name", TRAINED)
@given(data=st.data())
def test_any_ids_cover_what_they_spell(name, data):
    tokenizer = named(name)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    table = token_bytes(tokenizer)
    pieces = [b"" if i in table.special or i == table.unknown else table.pieces[i] for i in ids]
    if name != "bpe":  # these put a space in front of every text
        first = next((at for at, piece in enumerate(pieces) if piece), None)
        if first is not None:
            pieces[first] = pieces[first].removeprefix(b" ")
    text, spans = sampled_text(tokenizer, ids)
    kept = whole_characters(b"".join(pieces))
    position = byte = 0
    for at, piece in enumerate(pieces):
        valid = sum(kept[position : position + len(piece)])
        assert (spans.starts[at], spans.ends[at]) == (byte, byte + valid)
        assert spans.unknown[at] == (0 < valid < len(piece))
        lost = bool(piece) and not valid
        assert spans.added[at] == (lost or (not piece and not _only_a_space(table, ids[at])))
        position, byte = position + len(piece), byte + valid
    expected = bytes(value for value, whole in zip(b"".join(pieces), kept, strict=True) if whole)
    assert text.encode() == expected
    assert spans.length == len(expected)


def _only_a_space(table, index: int) -> bool:
    return table.pieces[index] == b" " and index not in table.special


@pytest.mark.parametrize("name", ["bpe", "sentencepiece"])
@given(text=st.text(max_size=20))
def test_a_tokenisation_gives_its_text_back(name, text):
    tokenizer = named(name)
    table = token_bytes(tokenizer)
    ids = table.tracer.encode(text, add_special_tokens=False).ids
    if any(i in table.special or i == table.unknown for i in ids):
        return  # the text spells a special token, or holds what the vocabulary doesn't
    found, spans = sampled_text(tokenizer, ids)
    given_spans = token_byte_spans(tokenizer, text, ids, ())
    assert found == text
    assert spans.ends.tolist() == given_spans.ends.tolist()
    assert not spans.unknown.any()


def test_a_response_that_ends_inside_a_character():
    tokenizer = named("bpe")
    ids = tokenizer("a é", add_special_tokens=False)["input_ids"]
    table = token_bytes(tokenizer)
    pieces = [table.pieces[i] for i in ids]
    if pieces[-1] != "é".encode():  # two tokens: the first alone is no character
        text, spans = sampled_text(tokenizer, ids[:-1])
        assert text == "a "
        assert spans.ends[-1] == spans.starts[-1] + (pieces[-2][:1] == b" ")
    accent = next(i for i, piece in enumerate(table.pieces) if piece == b"\xc3")
    text, spans = sampled_text(tokenizer, [*tokenizer("ab", add_special_tokens=False)["input_ids"], accent])
    assert text == "ab"
    assert spans.added[-1]
    assert not spans.added[:-1].any()
