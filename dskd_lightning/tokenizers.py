"""What every part of the package needs of a fast tokenizer: its backend, its fingerprint, clean text."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from dskd_lightning.errors import UserError

__all__ = ["backend_config", "encoded", "fast_backend", "sanitize_text", "tokenizer_fingerprint"]

_THREADS = "TOKENIZERS_PARALLELISM"


def fast_backend(tokenizer: Any) -> Any:
    """The ``tokenizers.Tokenizer`` inside a fast tokenizer (or the object itself, if it is one).

    Raises:
        UserError: a slow (pure Python) tokenizer, which reports no offsets.
    """
    from tokenizers import Tokenizer

    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return backend
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    raise UserError(
        f"The tokenizer {name!r} ({type(tokenizer).__name__}) is a slow one without offsets: give a folder "
        "that holds a tokenizer.json, or convert it once with "
        "transformers.convert_slow_tokenizer.convert_slow_tokenizer(tokenizer).save('tokenizer.json')."
    )


def backend_config(tokenizer: Any) -> dict[str, Any]:
    """The backend's serialised state without padding and truncation, which calls change in passing."""
    config: dict[str, Any] = json.loads(fast_backend(tokenizer).to_str())
    config.pop("padding", None)
    config.pop("truncation", None)
    return config


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over the backend's JSON: equal for tokenizers that cut every text alike.

    The chat template and the choice of end-of-sequence token are not part of the backend: hash
    them beside it where they matter.
    """
    text = fast_backend(tokenizer).to_str()
    # Behind padding and truncation, which calls change in passing; parsing megabytes would take a second.
    return hashlib.sha256(text[text.index('"added_tokens":') :].encode()).hexdigest()


def encoded(backend: Any, texts: Sequence[str], *, threads: bool = True) -> list[list[int]]:
    """Tokens of each text, without those that a tokenizer puts around it.

    Args:
        backend: as `fast_backend` gives it.
        texts: valid Unicode.
        threads: False for the thread that asks alone, where other processes do the same on other cores.
            ``TOKENIZERS_PARALLELISM``, where it is set, decides in any case.
    """
    with contextlib.nullcontext() if threads else _threads_off():
        return [code.ids for code in backend.encode_batch_fast(texts, add_special_tokens=False)]


@contextlib.contextmanager
def _threads_off() -> Iterator[None]:
    if _THREADS in os.environ:
        yield
        return
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        os.environ.pop(_THREADS, None)


def sanitize_text(text: str) -> str:
    """``text`` as valid Unicode: surrogate pairs joined, lone surrogates replaced by U+FFFD.

    JSON with ``\\ud83d`` escapes gives such strings; no tokenizer takes them. Valid text is
    returned as it is.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
