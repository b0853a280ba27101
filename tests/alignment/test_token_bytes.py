"""A tokenizer's vocabulary as bytes, read without parsing all of its JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import make_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordPiece

from dskd_lightning.alignment.token_bytes import _settings, token_bytes

NAMES_OF_PARTS = ['"model":{"type":"BPE",', ',"vocab":{', '"}},']


def without_tables(config: dict[str, Any]) -> dict[str, Any]:
    model = {name: value for name, value in config["model"].items() if name not in ("vocab", "merges")}
    return {**config, "model": model}


def bpe(**settings: Any) -> Tokenizer:
    tokenizer = Tokenizer(BPE({"a": 0, ',"vocab":{': 1, "}}": 2}, [], **settings))
    tokenizer.add_tokens(NAMES_OF_PARTS)
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        make_tokenizer("bpe").backend_tokenizer,
        make_tokenizer("sentencepiece").backend_tokenizer,
        bpe(),
        bpe(unk_token="a", byte_fallback=True, end_of_word_suffix="</w>"),
        Tokenizer(Unigram([("a", 0.0), ('"model":{"type":"BPE",', -1.0)], unk_id=0)),
        Tokenizer(WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
    ],
    ids=["bpe", "sentencepiece", "parts as tokens", "set", "unigram", "wordpiece"],
)
def test_the_settings_are_those_of_the_whole_json(tokenizer: Tokenizer) -> None:
    written = tokenizer.to_str()
    found = _settings(written)
    assert without_tables(found) == without_tables(json.loads(written))
    assert ("vocab" in found["model"]) == (found["model"]["type"] != "BPE")


def test_another_order_or_name_of_the_parts_is_parsed_whole() -> None:
    config = json.loads(bpe().to_str())
    model = config["model"]
    vocabulary_first = {**config, "model": {"type": "BPE", "vocab": model["vocab"], **model}}
    for changed in (vocabulary_first, {**config, "model": {**config["model"], "type": "Other"}}):
        assert _settings(json.dumps(changed, separators=(",", ":"))) == changed
    less = {name: value for name, value in config["model"].items() if name != "byte_fallback"}
    assert _settings(json.dumps({**config, "model": less}, separators=(",", ":")))["model"] == less


def test_tokens_that_look_like_parts_of_the_json_keep_their_bytes() -> None:
    table = token_bytes(bpe())
    assert table.pieces == [b"a", b',"vocab":{', b"}}", b'"model":{"type":"BPE",', b'"}},']
