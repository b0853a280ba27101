"""The bytes that each id of a tokenizer stands for, read once from its vocabulary."""

from __future__ import annotations

import json
import re
import unicodedata
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dskd_lightning.tokenizers import fast_backend

__all__ = ["TokenBytes", "is_byte_token", "token_bytes", "token_text"]


@dataclass(frozen=True)
class TokenBytes:
    """Vocabulary of one tokenizer with markers and byte encodings undone.

    Args:
        pieces: bytes of each id; a leading-space marker is a space. Empty for unused ids.
        lengths: ``[vocab]`` int32, length of each piece.
        added: ids of added tokens, special or not, which cut the text before the model sees it.
        special: ids of special tokens, whose piece is their literal text.
        unknown: id of the model's unknown token, or -1.
        tracer: the backend without post-processor: offsets untrimmed, nothing added.
    """

    pieces: list[bytes]
    lengths: npt.NDArray[np.int32]
    added: frozenset[int]
    special: frozenset[int]
    unknown: int
    tracer: Any


_Marks = dict[int, str | None]
_CACHE: weakref.WeakKeyDictionary[Any, tuple[_Marks, TokenBytes]] = weakref.WeakKeyDictionary()


def token_bytes(tokenizer: Any) -> TokenBytes:
    """The `TokenBytes` of a fast tokenizer; kept until the tokenizer goes or gains tokens."""
    backend = fast_backend(tokenizer)
    cached = _CACHE.get(tokenizer)
    if cached is None or any(backend.id_to_token(index) != token for index, token in cached[0].items()):
        table = _read(tokenizer)
        # Where the next new token goes; asking for the size goes through all added tokens each time.
        ids = (len(table.pieces), backend.get_vocab_size(with_added_tokens=False))
        cached = ({index: backend.id_to_token(index) for index in ids}, table)
        _CACHE[tokenizer] = cached
    return cached[1]


def _read(tokenizer: Any) -> TokenBytes:
    from tokenizers import Tokenizer

    written = fast_backend(tokenizer).to_str()
    config = _settings(written)
    # Rebuilt from JSON rather than copied, so that nobody's padding or truncation is disturbed.
    tracer = Tokenizer.from_str(written)
    tracer.no_padding()
    tracer.no_truncation()
    tracer.post_processor = None
    decode = _piece_decoder(config)
    added = tracer.get_added_tokens_decoder()
    if _falls_back_to_bytes(config):  # byte tokens may be registered as special ones
        added = {index: token for index, token in added.items() if not is_byte_token(token.content)}
    vocab = tracer.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, index in vocab.items():
        literal = index in added and (added[index].special or tracer.model.token_to_id(token) is None)
        pieces[index] = token.encode() if literal else decode(token)
    return TokenBytes(
        pieces=pieces,
        lengths=np.fromiter(map(len, pieces), np.int32, len(pieces)),
        added=frozenset(added),
        special=frozenset(index for index, token in added.items() if token.special),
        unknown=_unknown_id(config["model"], vocab),
        tracer=tracer,
    )


_WITH_VOCABULARY_LAST = '"model":{"type":"BPE",'
_READ_OF_BPE = {"unk_token", "end_of_word_suffix", "byte_fallback"}


def _settings(written: str) -> dict[str, Any]:
    """A tokenizer's JSON, without a BPE's vocabulary and merges, which take most of a second to parse."""
    model = written.find(_WITH_VOCABULARY_LAST)
    vocabulary = written.find(',"vocab":{', model)
    if min(model, vocabulary) >= 0:
        settings: dict[str, Any] = json.loads(written[:vocabulary] + "}}")
        if settings["model"].keys() >= _READ_OF_BPE:
            return settings
    whole: dict[str, Any] = json.loads(written)
    return whole


def _unknown_id(model: dict[str, Any], vocab: dict[str, int]) -> int:
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    return vocab.get(model.get("unk_token") or "", -1)


def _nodes(config: Any) -> Iterator[dict[str, Any]]:
    """Every component of a nested normaliser, pre-tokenizer or decoder."""
    if isinstance(config, dict):
        if "type" in config:
            yield config
        for value in config.values():
            yield from _nodes(value)
    elif isinstance(config, list):
        for value in config:
            yield from _nodes(value)


def _piece_decoder(config: dict[str, Any]) -> Any:
    """A function from a token's string to its bytes, chosen by the tokenizer's own components."""
    model = config["model"]
    nodes = [n for key in ("normalizer", "pre_tokenizer", "decoder") for n in _nodes(config.get(key))]
    types = {node["type"] for node in nodes}
    markers = {node["replacement"] for node in nodes if node["type"] == "Metaspace"}
    for node in nodes:
        if node["type"] == "Replace":
            pattern = node["pattern"].get("String", "")
            markers |= {node["content"]} if pattern == " " else {pattern} if node["content"] == " " else set()
    markers = {marker for marker in markers if marker and not marker.isspace()}
    byte_fallback = _falls_back_to_bytes(config)
    suffix = model.get("end_of_word_suffix") or ""

    def plain(token: str) -> bytes:
        if byte_fallback and is_byte_token(token):
            return bytes([int(token[3:5], 16)])
        for marker in markers:
            token = token.replace(marker, " ")
        return (token.removesuffix(suffix) if suffix else token).encode()

    def byte_level(token: str) -> bytes:
        try:
            return bytes(map(_BYTE_OF.__getitem__, token.removesuffix(suffix) if suffix else token))
        except KeyError:  # a vocabulary entry outside the byte alphabet
            return token.encode()

    def word_piece(token: str) -> bytes:
        if prefix and token.startswith(prefix) and len(token) > len(prefix):
            return token[len(prefix) :].encode()
        return (" " + token if _starts_word(token) else token).encode()

    if "ByteLevel" in types:
        return byte_level
    if model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix") or ""
        return word_piece
    return plain


def _falls_back_to_bytes(config: dict[str, Any]) -> bool:
    decoder = {node["type"] for node in _nodes(config.get("decoder"))}
    return bool(config["model"].get("byte_fallback")) or "ByteFallback" in decoder


def is_byte_token(token: str) -> bool:
    """``<0x00>`` to ``<0xFF>``."""
    return bool(_BYTE_TOKEN.fullmatch(token))


def _starts_word(token: str) -> bool:
    """Whether a space comes before this word-initial WordPiece: letters and digits, CJK excepted."""
    category, code = unicodedata.category(token[0])[0], ord(token[0])
    return category in "LN" and not (0x2E80 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or code >= 0x20000)


def _byte_alphabet() -> dict[str, int]:
    """Inverse of GPT-2's map of the 256 bytes to printable characters."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def token_text(piece: bytes) -> str:
    """``piece`` on one line: spaces visible, control characters and broken bytes escaped."""
    text = piece.decode(errors="backslashreplace").replace(" ", "␣")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
