"""Vocabulary maps against brute force, their cache, and their special tokens."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from real_tokenizers import tokenizer_named

from dskd_lightning.alignment import nearest
from dskd_lightning.alignment.nearest import nearest_strings, nearest_token_map
from dskd_lightning.alignment.vocabulary import exact_token_map, token_projection, vocabulary_bytes
from dskd_lightning.tokenizers import tokenizer_fingerprint


def test_markers_and_byte_encodings_are_undone() -> None:
    for kind in ("bpe", "sentencepiece"):
        pieces = vocabulary_bytes(make_tokenizer(kind))
        assert {b" ", b"\xe2", b"e"} <= set(pieces)
        assert None in pieces
    pieces = vocabulary_bytes(make_tokenizer("wordpiece"))
    assert b"e" in pieces
    assert b" e" in pieces


def test_exact_map_matches_bytes_and_ends_of_sequence() -> None:
    source, target = make_tokenizer("bpe"), make_tokenizer("sentencepiece")
    pieces, others = vocabulary_bytes(source), vocabulary_bytes(target)
    mapped = exact_token_map(source, target)
    assert mapped[source.eos_token_id] == target.eos_token_id
    assert mapped[source.pad_token_id] == -1
    for index, other in enumerate(mapped.tolist()):
        if other >= 0 and index != source.eos_token_id:
            assert pieces[index] == others[other]
        elif other < 0 and pieces[index] is not None:
            assert pieces[index] not in others
    assert (mapped >= 0).sum() > 250


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=12), max_size=12), st.lists(st.binary(max_size=12), min_size=1))
def test_nearest_is_brute_force(queries: list[bytes], candidates: list[bytes]) -> None:
    for query, best in zip(queries, nearest_strings(queries, candidates).tolist(), strict=True):
        distances = [Levenshtein.distance(query, candidate) for candidate in candidates]
        assert best == int(np.argmin(distances))


def test_long_strings_do_not_overflow_the_distance_type() -> None:
    candidates = [b"x" * 150, b"ab" * 350]
    assert Levenshtein.distance(b"a" * 500, candidates[1]) == 350  # 94 in a byte
    assert nearest_strings([b"a" * 500, b"b" * 100], candidates).tolist() == [1, 0]


def test_the_map_is_read_back_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = make_tokenizer("bpe", 400), make_tokenizer("bpe", 300)
    made = nearest_token_map(source, target, tmp_path)
    (file,) = tmp_path.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(nearest, "_nearest", lambda *_: pytest.fail("computed again"))
        assert np.array_equal(nearest_token_map(source, target, tmp_path), made)
    good = file.read_bytes()
    flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(200, len(good), 301)]
    for damaged in (b"broken", b"", good[:-9], *flipped):
        caplog.clear()
        file.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert np.array_equal(nearest_token_map(source, target, tmp_path), made)
        assert "made anew" in caplog.text
        with np.load(file) as archive:
            assert np.array_equal(archive["tokens"], made)
    nearest_token_map(target, source, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_projection_rows_sum_to_one_and_follow_the_pieces() -> None:
    student, teacher = make_tokenizer("bpe", 400), make_tokenizer("bpe", 300)
    projection = token_projection(student, teacher)
    dense = torch.zeros(projection.shape)
    dense[torch.from_numpy(projection.rows), torch.from_numpy(projection.columns)] = torch.from_numpy(
        projection.weights
    )
    sums = dense.sum(1)
    assert torch.isclose(sums[sums > 0], torch.tensor(1.0)).all()
    exact = exact_token_map(student, teacher)
    pieces = vocabulary_bytes(student)
    checked = 0
    for index, other in enumerate(exact.tolist()):
        if other >= 0:
            assert dense[index, other] == 1
        elif pieces[index] is not None and pieces[index].isascii():
            ids = teacher(pieces[index].decode(), add_special_tokens=False)["input_ids"]
            expected = torch.zeros(len(teacher))
            for place, token in enumerate(ids):
                expected[token] += 0.5**place / sum(0.5**k for k in range(len(ids)))
            torch.testing.assert_close(dense[index], expected)
            checked += 1
    assert checked > 20
    first = token_projection(student, teacher, decay=0.0)
    assert (first.weights == 1).all()


def test_pieces_are_cut_without_a_prepended_marker() -> None:
    student, teacher = make_tokenizer("bpe", 400), make_tokenizer("sentencepiece", 600)
    space = exact_token_map(student, teacher)[student.convert_tokens_to_ids("Ġ")]
    projection = token_projection(student, teacher)
    pieces = vocabulary_bytes(student)
    for row, column in zip(projection.rows, projection.columns, strict=True):
        if not (pieces[row] or b" ").count(b" "):
            assert column != space


def test_fingerprints_tell_tokenizers_apart_and_survive_padding() -> None:
    one, two = make_tokenizer("bpe", 300), make_tokenizer("bpe", 400)
    before = tokenizer_fingerprint(one)
    one(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(one) == before != tokenizer_fingerprint(two)


@pytest.mark.slow
def test_gpt2_by_mistral_takes_well_under_a_minute(data_dir: Path) -> None:
    import time

    begin = time.perf_counter()
    mapped = nearest_token_map(tokenizer_named("gpt2"), tokenizer_named("mistral"))
    assert time.perf_counter() - begin < 45
    assert (mapped >= 0).mean() > 0.999
