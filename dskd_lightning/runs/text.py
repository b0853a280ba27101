"""Model and data text made safe to show, and numbers of bytes."""

from __future__ import annotations

import unicodedata

__all__ = ["byte_count", "shorten", "visible"]

_KEPT = "\n\t"
# Bidirectional overrides reorder what surrounds them; zero-width joiners are part of emoji and scripts.
_BIDI = {*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}


def visible(text: str) -> str:
    """The text with control characters, lone surrogates and direction overrides replaced by U+FFFD."""
    return "".join(
        character if character in _KEPT or not _hidden(character) else "\ufffd"
        for character in text.replace("\r\n", "\n")
    )


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters, an ellipsis included."""
    return text if len(text) <= limit else text[: max(0, limit - 1)].rstrip() + "…"


def _hidden(character: str) -> bool:
    return (
        character in _BIDI
        or unicodedata.category(character) in ("Cc", "Cs")
        or character in "\u2028\u2029\ufffe\uffff"
    )


def byte_count(count: float) -> str:
    """Bytes as a person reads them, in powers of ten."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"
