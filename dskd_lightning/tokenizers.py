"""What every part of the package needs of a fast tokenizer: its backend, its fingerprint, clean text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dskd_lightning.errors import UserError

__all__ = ["backend_config", "fast_backend", "sanitize_text", "tokenizer_fingerprint"]


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
    canonical = json.dumps(backend_config(tokenizer), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


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
