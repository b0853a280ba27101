"""Tokens of normalising tokenizers stand for the bytes that they claim, or are left out and counted."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from dskd_lightning.alignment import align, token_byte_spans, token_bytes
from dskd_lightning.alignment._offset_spans import offset_ends

PIECES = [
    "▁",
    "T",
    "M",
    "TM",
    "s",
    "a",
    "b",
    "▁a",
    "▁s",
    "fi",
    "f",
    "i",
    "1",
    "▁T",
    "ab",
    "[",
    "31",
    "3",
    "m",
]


def unigram(unknown: bool = True) -> Tokenizer:
    scores = [("<unk>", 0.0), *[(piece, -2.0) for piece in PIECES]]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0 if unknown else None))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def characters() -> Tokenizer:
    """A byte-level tokenizer with one token for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


UNIGRAM, BYTES = unigram(), characters()
texts = st.lists(
    st.sampled_from([*"TMsabfi1[3m \n", "\u2122", "\u017f", "\ufb01", "\u2460", "\x1b", "é", "<unk>"])
)


def dense(text: str) -> str:
    return "".join(text.replace("▁", " ").split())


@given(text=texts.map("".join))
@settings(max_examples=300, deadline=None)
def test_known_tokens_are_the_normal_form_of_the_bytes_they_claim(text: str) -> None:
    spans = token_byte_spans(UNIGRAM, text)
    code = UNIGRAM.encode(text, add_special_tokens=False)
    data, begin = text.encode(), 0
    for i, end in enumerate(spans.ends.tolist()):
        if end == spans.starts[i]:
            continue  # a marker, or a piece of a character that several tokens make up
        group = slice(begin, i + 1)
        begin = i + 1
        if spans.unknown[group].any():
            continue
        claimed = data[spans.starts[group][0] : end].decode()
        assert dense(unicodedata.normalize("NFKC", claimed)) == dense("".join(code.tokens[group]))
    lost = sum(
        int(end - start)
        for start, end, unknown in zip(spans.starts, spans.ends, spans.unknown, strict=True)
        if unknown
    )
    covered = int(spans.ends[-1]) if len(spans) else 0
    assert spans.unaligned_bytes == lost + len(data) - covered


@given(text=texts.map("".join))
@settings(max_examples=200, deadline=None)
def test_exact_pairs_with_single_bytes_are_those_bytes(text: str) -> None:
    ours, bytes_ = token_byte_spans(UNIGRAM, text), token_byte_spans(BYTES, text)
    tokens = UNIGRAM.encode(text, add_special_tokens=False).tokens
    data = text.encode()
    for student, teacher in align(ours, bytes_).pairs.tolist():
        byte = data[bytes_.starts[teacher] : bytes_.ends[teacher]].decode()
        assert dense(tokens[student]) == dense(byte)


@pytest.mark.parametrize("text", ["\u2122", "\u017f"])
def test_a_prepended_marker_takes_no_byte_of_a_character(text: str) -> None:
    spans = token_byte_spans(UNIGRAM, text)
    assert spans.ends[-1] == len(text.encode())
    assert not spans.unknown.any()
    assert all(end in (0, len(text.encode())) for end in spans.ends.tolist())


def shifted(table: Any, by: int) -> Any:
    def encode(text: str, add_special_tokens: bool) -> Any:
        code = table.tracer.encode(text, add_special_tokens=add_special_tokens)
        moved = [tuple(min(max(at + by, 0), len(text)) for at in pair) for pair in code.offsets]
        return SimpleNamespace(ids=code.ids, offsets=moved)

    return replace(table, tracer=SimpleNamespace(encode=encode, normalizer=table.tracer.normalizer))


@pytest.mark.parametrize("by", [-1, 1])
def test_offsets_that_are_off_by_one_align_nothing_wrong(by: int) -> None:
    text = "[31mab"
    table = shifted(token_bytes(UNIGRAM), by)
    ids = UNIGRAM.encode(text, add_special_tokens=False).ids
    unknown, added = np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.bool_)
    ends, _ = offset_ends(table, text, text.encode(), ids, unknown, added)
    starts = np.concatenate(([0], ends[:-1]))
    wrong = [
        not lost and text[start:end] != dense(table.pieces[index].decode())
        for index, start, end, lost in zip(ids, starts, ends, unknown, strict=True)
        if end > start
    ]
    assert not any(wrong)
    assert unknown.sum() >= 3


def test_the_unknown_tokens_own_string_is_a_known_text_on_both_paths() -> None:
    """The first text is spelt by its tokens, the second needs offsets for its long s."""
    tokenizer = unigram()
    tokenizer.add_special_tokens(["<unk>"])
    for text in ("a<unk>a", "\u017f<unk>a", "é<unk>a"):
        code = tokenizer.encode(text, add_special_tokens=False)
        spans = token_byte_spans(tokenizer, text)
        data = text.encode()
        own = [i for i in range(len(spans)) if data[spans.starts[i] : spans.ends[i]] == b"<unk>"]
        assert [code.tokens[i] for i in own] == ["<unk>"]
        assert not spans.unknown[own].any()
        assert spans.unaligned_bytes == (2 if "é" in text else 0)


def test_the_size_of_the_vocabulary_is_not_asked_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through all added tokens, of which Gemma has thousands."""
    import sys

    tokenizer = unigram()
    table, asked = token_bytes(tokenizer), []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(tokenizer, name)

    module = sys.modules["dskd_lightning.alignment.token_bytes"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "fast_backend", lambda _: Counting())
        assert token_bytes(tokenizer) is table
    assert "get_vocab_size" not in asked
    tokenizer.add_tokens(["zebra"])
    assert token_bytes(tokenizer).pieces[-1] == b"zebra"
    tokenizer.add_special_tokens(["<zebra>"])
    assert token_bytes(tokenizer).pieces[-1] == b"<zebra>"
