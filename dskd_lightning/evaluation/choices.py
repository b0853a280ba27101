"""Which of a question's choices an answer names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["FIELD", "choices_of", "chosen"]

FIELD = "choices"
"""Field of a record: the answers that its question leaves, a list of texts."""


def choices_of(fields: Mapping[str, Any]) -> list[str]:
    """The choices of a record, none where it has no list of different texts of at least two."""
    found = fields.get(FIELD)
    if not isinstance(found, list) or not all(isinstance(text, str) and text.strip() for text in found):
        return []
    texts = list(dict.fromkeys(text.strip() for text in found))
    return texts if len(texts) == len(found) > 1 else []


def chosen(answer: str, choices: list[str]) -> str | None:
    """The choice that stands first in an answer, as words of their own; None where none does.

    Of choices that begin at one place the longest is taken. Case counts for choices of one letter alone.
    """
    found = []
    for choice in choices:
        flags = 0 if len(choice) == 1 else re.IGNORECASE
        match = re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", answer, flags)
        if match is not None:
            found.append((match.start(), -len(choice), choice))
    return min(found)[2] if found else None
