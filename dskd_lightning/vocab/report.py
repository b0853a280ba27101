"""What two tokenizers have in common, counted over vocabularies and over real text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Coverage", "Offender", "Recommendation", "Script", "VocabReport"]


@dataclass(frozen=True)
class Coverage:
    """One side's tokens in the texts, by what the other side has for them.

    *Exact*: one token of the other side covers the same bytes. *Grouped*: a minimal group of more
    than one token on some side does. *None*: no group, because of unknown or dropped text.

    Args:
        tokens: different tokens seen.
        occurrences: tokens seen, repeats included.
        bytes: bytes that they cover.
        exact_tokens: different tokens that were always or sometimes in an exact pair.
        exact_occurrences: occurrences in exact pairs.
        grouped_occurrences: occurrences in larger groups.
        exact_bytes: bytes of tokens in exact pairs.
        grouped_bytes: bytes of tokens in larger groups.
        in_vocabulary: occurrences whose token the other vocabulary holds, wherever cut.
    """

    tokens: int
    occurrences: int
    bytes: int
    exact_tokens: int
    exact_occurrences: int
    grouped_occurrences: int
    exact_bytes: int
    grouped_bytes: int
    in_vocabulary: int

    def shares(self) -> dict[str, float]:
        """Shares of 1 of every kind; 0 where nothing was seen."""
        seen, covered = max(self.occurrences, 1), max(self.bytes, 1)
        lost = self.occurrences - self.exact_occurrences - self.grouped_occurrences
        return {
            "exact_tokens": self.exact_tokens / max(self.tokens, 1),
            "exact_occurrences": self.exact_occurrences / seen,
            "grouped_occurrences": self.grouped_occurrences / seen,
            "no_counterpart_occurrences": lost / seen,
            "exact_bytes": self.exact_bytes / covered,
            "grouped_bytes": self.grouped_bytes / covered,
            "no_counterpart_bytes": (self.bytes - self.exact_bytes - self.grouped_bytes) / covered,
            "in_vocabulary_occurrences": self.in_vocabulary / seen,
        }


@dataclass(frozen=True)
class Script:
    """Student tokens of one kind of text (digits, whitespace, a script ...).

    Args:
        name: the kind.
        occurrences: student tokens of it.
        inexact: those that are in no exact pair.
    """

    name: str
    occurrences: int
    inexact: int


@dataclass(frozen=True)
class Offender:
    """A text that the two tokenizers cut differently.

    Args:
        text: the bytes of the group, undecodable ones escaped.
        student: its student tokens.
        teacher: its teacher tokens.
        occurrences: how often it was seen.
    """

    text: str
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    occurrences: int


@dataclass(frozen=True)
class Recommendation:
    """The objective to begin with.

    Args:
        class_path: for the config.
        reason: the counts that led to it.
    """

    class_path: str
    reason: str


@dataclass(frozen=True)
class VocabReport:
    """The result of ``dskd vocab``; `to_dict` is its JSON.

    Args:
        teacher: where the teacher's tokenizer came from.
        student: likewise.
        data: what the texts are.
        texts: number of responses.
        bytes: their UTF-8 bytes.
        teacher_size: entries of the teacher's vocabulary, special ones included.
        student_size: likewise.
        shared: student tokens with the same bytes in the teacher's vocabulary.
        teacher_shared: teacher tokens with the same bytes in the student's.
        identical: ids mean the same on both sides, but for a few that one side has alone: objectives
            on one vocabulary take the pair.
        normalized: names of the sides ("teacher", "student") that change some of the texts.
        unknown_bytes: bytes of unknown tokens and dropped text by side.
        student_coverage: the student's tokens in the texts.
        teacher_coverage: the teacher's.
        scripts: student tokens by kind of text, most inexact first.
        offenders: texts cut differently, most frequent first.
        recommendation: the objective to begin with.
    """

    teacher: str
    student: str
    data: str
    texts: int
    bytes: int
    teacher_size: int
    student_size: int
    shared: int
    teacher_shared: int
    identical: bool
    normalized: tuple[str, ...]
    unknown_bytes: dict[str, int]
    student_coverage: Coverage
    teacher_coverage: Coverage
    scripts: tuple[Script, ...]
    offenders: tuple[Offender, ...]
    recommendation: Recommendation = field(default_factory=lambda: Recommendation("", ""))

    def to_dict(self) -> dict[str, Any]:
        """Plain types, with the shares spelled out."""
        result = asdict(self)
        for side in ("student_coverage", "teacher_coverage"):
            result[side]["shares"] = getattr(self, side).shares()
        return result
