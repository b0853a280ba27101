"""Compare two tokenizers over texts by byte-exact alignment."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dskd_lightning.alignment.byte_spans import ByteSpans, batch_byte_spans
from dskd_lightning.alignment.exact import align_many
from dskd_lightning.alignment.token_bytes import token_bytes, token_text
from dskd_lightning.alignment.vocabulary import exact_token_map, vocabulary_difference
from dskd_lightning.tokenizers import encoded, sanitize_text
from dskd_lightning.vocab.recommendation import recommend
from dskd_lightning.vocab.report import Coverage, Offender, Script, VocabReport

__all__ = ["analyze_vocabularies", "kind_of_text"]

_BLOCK = 256
"""Texts aligned at once."""


def analyze_vocabularies(
    teacher: Any,
    student: Any,
    texts: Sequence[str],
    *,
    names: tuple[str, str] = ("teacher", "student"),
    data: str = "",
    worst: int = 12,
) -> VocabReport:
    """Overlap of two vocabularies and how their tokens meet in ``texts``.

    Args:
        teacher: the teacher's tokenizer.
        student: the student's.
        texts: responses, without template.
        names: what to call the teacher and the student in the report.
        data: what to call the texts.
        worst: how many differently cut texts to list.

    Raises:
        UserError: one of the tokenizers is slow.
    """
    maps = exact_token_map(student, teacher), exact_token_map(teacher, student)
    sides = _Side(student, maps[0]), _Side(teacher, maps[1])
    kinds: Counter[tuple[str, bool]] = Counter()
    groups: Counter[tuple[bytes, tuple[int, ...], tuple[int, ...]]] = Counter()
    texts = [sanitize_text(text) for text in texts]
    for begin in range(0, len(texts), _BLOCK):
        _count(texts[begin : begin + _BLOCK], sides, kinds, groups)
    scripts = [
        Script(name, kinds[name, True] + kinds[name, False], kinds[name, False])
        for name in {name for name, _ in kinds}
    ]
    one, two = (token_bytes(side.tokenizer).pieces for side in sides)
    offenders = [
        Offender(
            token_text(text), tuple(token_text(one[i]) for i in s), tuple(token_text(two[i]) for i in t), n
        )
        for (text, s, t), n in sorted(groups.items(), key=lambda item: (-item[1], item[0]))[:worst]
    ]
    report = VocabReport(
        teacher=names[0],
        student=names[1],
        data=data,
        texts=len(texts),
        bytes=sum(len(text.encode()) for text in texts),
        teacher_size=len(teacher),
        student_size=len(student),
        shared=int((maps[0] >= 0).sum()),
        teacher_shared=int((maps[1] >= 0).sum()),
        identical=vocabulary_difference(student, teacher) is None,
        normalized=tuple(
            name for name, side in zip(("student", "teacher"), sides, strict=True) if side.changed
        ),
        unknown_bytes={"student": sides[0].lost, "teacher": sides[1].lost},
        student_coverage=sides[0].coverage(),
        teacher_coverage=sides[1].coverage(),
        scripts=tuple(sorted(scripts, key=lambda script: (-script.inexact, script.name))),
        offenders=tuple(offenders),
    )
    return replace(report, recommendation=recommend(report))


class _Side:
    """Running counts of one tokenizer's tokens by id: exact, grouped and neither."""

    def __init__(self, tokenizer: Any, mapped: np.ndarray) -> None:
        self.tokenizer, self.mapped = tokenizer, mapped
        self.counts = np.zeros((3, len(mapped)), np.int64)
        self.bytes = np.zeros(3, np.int64)
        self.lost = 0
        self.changed = False

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[ByteSpans]]:
        ids = encoded(token_bytes(self.tokenizer).tracer, texts)
        spans = batch_byte_spans(self.tokenizer, texts, ids, ())
        self.lost += sum(span.unaligned_bytes for span in spans)
        self.changed |= any(span.normalized for span in spans)
        return ids, spans

    def add(self, ids: list[int], spans: ByteSpans, kind: np.ndarray) -> None:
        np.add.at(self.counts, (kind, np.asarray(ids, np.int64)), 1)
        self.bytes += np.bincount(kind, spans.ends - spans.starts, minlength=3).astype(np.int64)

    def coverage(self) -> Coverage:
        seen = self.counts.sum(axis=0)
        return Coverage(
            tokens=int((seen > 0).sum()),
            occurrences=int(seen.sum()),
            bytes=int(self.bytes.sum()),
            exact_tokens=int((self.counts[0] > 0).sum()),
            exact_occurrences=int(self.counts[0].sum()),
            grouped_occurrences=int(self.counts[1].sum()),
            exact_bytes=int(self.bytes[0]),
            grouped_bytes=int(self.bytes[1]),
            in_vocabulary=int(seen[self.mapped >= 0].sum()),
        )


_EXACT, _GROUPED, _NONE = range(3)


def _count(
    texts: Sequence[str],
    sides: tuple[_Side, _Side],
    kinds: Counter[tuple[str, bool]],
    groups: Counter[tuple[bytes, tuple[int, ...], tuple[int, ...]]],
) -> None:
    tokens = [side.tokenize(texts) for side in sides]
    aligned = align_many(tokens[0][1], tokens[1][1])
    for place, (text, alignment) in enumerate(zip(texts, aligned, strict=True)):
        data = text.encode()
        of_tokens = [alignment.student_group, alignment.teacher_group]
        for side, group, column, (ids, spans) in zip(sides, of_tokens, (0, 1), tokens, strict=True):
            kind = np.where(group >= 0, _GROUPED, _NONE)
            kind[alignment.pairs[:, column]] = _EXACT
            side.add(ids[place], spans[place], kind)
            if column == 0:
                for start, end, how in zip(spans[place].starts, spans[place].ends, kind, strict=True):
                    kinds[kind_of_text(data[start:end]), bool(how == _EXACT)] += 1
        paired = set(of_tokens[0][alignment.pairs[:, 0]].tolist())
        for number in sorted(set(range(alignment.groups)) - paired):
            at = [np.flatnonzero(group == number) for group in of_tokens]
            own = tokens[0][1][place]
            covered = data[own.starts[at[0][0]] : own.ends[at[0][-1]]]
            pieces = [tuple(side[0][place][i] for i in where) for side, where in zip(tokens, at, strict=True)]
            groups[covered, pieces[0], pieces[1]] += 1


def kind_of_text(data: bytes) -> str:
    """Whitespace, digits, punctuation, symbols, or the script of the first letter."""
    text = data.decode(errors="ignore")
    if not text:
        return "part of a character" if data else "no text"
    if text.isspace():
        return "whitespace"
    for char in text:
        category = unicodedata.category(char)
        if category[0] == "N":
            return "digits"
        if category[0] == "L":
            script = unicodedata.name(char, "other").split()[0].split("-")[0].lower()
            return {"latin": "Latin", "cjk": "Han"}.get(script, script.capitalize())
    has_symbol = any(unicodedata.category(char) in ("So", "Sk") for char in text)
    return "emoji and symbols" if has_symbol else "punctuation"
