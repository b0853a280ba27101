"""What changed between two responses, word by word."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rapidfuzz.distance import Indel

__all__ = ["Segment", "shared_share", "word_diff"]

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Segment:
    """A run of text that is in both responses (``equal``), gone (``delete``) or new (``insert``)."""

    kind: Literal["equal", "delete", "insert"]
    text: str


def word_diff(before: str, after: str) -> list[Segment]:
    """Segments that lead from ``before`` to ``after``.

    The equal and inserted ones spell ``after``, the equal and deleted ones ``before``.
    """
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    segments: list[Segment] = []
    for operation in Indel.opcodes(old, new):
        if operation.tag == "equal":
            segments.append(Segment("equal", "".join(new[operation.dest_start : operation.dest_end])))
        if operation.tag in ("delete", "replace"):
            segments.append(Segment("delete", "".join(old[operation.src_start : operation.src_end])))
        if operation.tag in ("insert", "replace"):
            segments.append(Segment("insert", "".join(new[operation.dest_start : operation.dest_end])))
    return segments


def shared_share(before: str, after: str) -> float:
    """Similarity of the two texts' words in [0, 1], white space and punctuation aside."""
    return float(Indel.normalized_similarity(re.findall(r"\w+", before), re.findall(r"\w+", after)))
