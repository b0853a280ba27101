"""Byte-exact alignment of two tokenisations of one response, in time linear in its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dskd_lightning.alignment.byte_spans import ByteSpans

if TYPE_CHECKING:
    from dskd_lightning.structures import Alignment

__all__ = ["ExampleAlignment", "align", "align_many", "batch_alignments", "group_overlap"]

_Ints = npt.NDArray[np.int32]
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ExampleAlignment:
    """How the tokens of one response group: `structures.Alignment` for a single example.

    Args:
        student_group: ``[n]``, group of each student token, -1 where it has none.
        teacher_group: ``[m]``, likewise.
        student_end: ``[n]``, byte offset where the token ends. The end-of-sequence token ends
            one past the text: after the last token of the text, as it is read after it.
        teacher_end: ``[m]``, likewise.
        pairs: ``[pairs, 2]``, student and teacher token of each 1-1 group, ascending.
        groups: number of groups; ids ascend with the text.
    """

    student_group: _Ints
    teacher_group: _Ints
    student_end: _Ints
    teacher_end: _Ints
    pairs: _Ints
    groups: int


def align(student: ByteSpans, teacher: ByteSpans) -> ExampleAlignment:
    """Minimal groups of student and teacher tokens that cover the same bytes of one response.

    The text is cut at every byte where tokens of both sides end. Between two cuts lies a group,
    unless one of its tokens is unknown or one side leaves part of it uncovered: such tokens stay
    without a group. End-of-sequence tokens form a group of their own, whatever precedes them.
    A token that covers no byte (a lone space marker) joins the group of its next neighbour with
    bytes or, behind the last one, of that; added special tokens other than the end join none.

    Raises:
        ValueError: the two sides are not spans of one text.
    """
    return align_many([student], [teacher])[0]


def align_many(students: Sequence[ByteSpans], teachers: Sequence[ByteSpans]) -> list[ExampleAlignment]:
    """`align` of many responses at once, without a Python loop over tokens.

    Raises:
        ValueError: the two sides are not spans of the same texts.
    """
    lengths = np.array([spans.length for spans in students], np.int64)
    if lengths.tolist() != [spans.length for spans in teachers]:
        raise ValueError("student and teacher spans are not of the same texts: their byte lengths differ")
    if not len(lengths):
        return []
    # All texts on one line of bytes, with one virtual byte behind each for its end of sequence.
    base = np.concatenate(([0], np.cumsum(lengths + 1)))
    left, right = _flatten(students, base), _flatten(teachers, base)
    regions, keep = _cut(left, right, base, lengths)
    count = len(keep)
    for side in (left, right):
        side.region[side.filled] = regions[side.end[side.filled] - 1]
        keep &= np.bincount(side.region[side.filled], minlength=count) > 0
    for side in (left, right):
        _attach_empty(side)
        lost = side.region[side.unknown]
        keep[lost[lost >= 0]] = False
    # Region -1 reads the last entry.
    group_of = np.append(np.where(keep, np.cumsum(keep) - 1, -1), -1).astype(np.int32)
    before = np.concatenate(([0], np.cumsum(keep)))[np.append(regions[base[:-1]], count)].astype(np.int32)
    return _split(left, right, group_of, before, base)


def group_overlap(alignment: ExampleAlignment) -> npt.NDArray[np.float64]:
    """``[n, m]``: 1 where a student and a teacher token are in one byte-exact group."""
    student, teacher = alignment.student_group[:, None], alignment.teacher_group[None, :]
    return ((student == teacher) & (student >= 0)).astype(np.float64)


def batch_alignments(alignments: Sequence[ExampleAlignment]) -> Alignment:
    """One `structures.Alignment` of a batch: positions and group ids counted over its examples."""
    import torch

    from dskd_lightning.structures import Alignment

    def offsets(sizes: list[int]) -> list[int]:
        return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64))).tolist()

    def joined(arrays: list[_Ints]) -> torch.Tensor:
        flat = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
        return torch.from_numpy(flat.astype(np.int64))

    groups = offsets([item.groups for item in alignments])
    students = offsets([len(item.student_group) for item in alignments])
    teachers = offsets([len(item.teacher_group) for item in alignments])
    moved = [
        (item.student_group, item.teacher_group, base) for item, base in zip(alignments, groups, strict=False)
    ]
    pairs = [
        item.pairs + np.array([[first, second]], np.int32)
        for item, first, second in zip(alignments, students, teachers, strict=False)
    ]
    return Alignment(
        student_group=joined([np.where(group >= 0, group + base, -1) for group, _, base in moved]),
        teacher_group=joined([np.where(group >= 0, group + base, -1) for _, group, base in moved]),
        student_end=joined([item.student_end for item in alignments]),
        teacher_end=joined([item.teacher_end for item in alignments]),
        pairs=joined(pairs).reshape(-1, 2),
        groups=groups[-1],
    )


@dataclass
class _Side:
    """The tokens of one side of all examples on the line of bytes."""

    example: _Ints
    end: _Ints
    unknown: _Bools
    empty: _Bools
    filled: _Bools
    closing: _Bools
    region: _Ints
    sizes: list[int]


def _flatten(spans: Sequence[ByteSpans], base: npt.NDArray[np.int64]) -> _Side:
    sizes = [len(item) for item in spans]
    example = np.repeat(np.arange(len(spans), dtype=np.int32), sizes)
    closing = np.concatenate([item.end for item in spans])
    added = np.concatenate([item.added for item in spans])
    starts = np.concatenate([item.starts for item in spans])
    ends = np.concatenate([item.ends for item in spans])
    filled = closing | ((ends > starts) & ~added)
    return _Side(
        example=example,
        end=np.where(closing, base[1:][example], base[example] + ends).astype(np.int32),
        unknown=np.concatenate([item.unknown for item in spans]),
        empty=~(filled | added),
        filled=filled,
        closing=closing,
        region=np.full(len(example), -1, np.int32),
        sizes=sizes,
    )


def _cut(
    left: _Side, right: _Side, base: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> tuple[_Ints, _Bools]:
    """Region of every byte, between two shared borders, and whether each region can be a group."""
    cuts = np.zeros(int(base[-1]) + 1, np.bool_)
    cuts[left.end[left.filled]] = True
    other = np.zeros_like(cuts)
    other[right.end[right.filled]] = True
    cuts &= other
    # Texts end, and so do their ends of sequence, even where the last bytes are uncovered.
    text_ends = (base[1:] - 1)[lengths > 0]
    torn = text_ends[~cuts[text_ends]]
    cuts[text_ends] = cuts[base[1:]] = True
    regions = np.cumsum(cuts, dtype=np.int32)
    keep = np.ones(int(regions[-1]), np.bool_)
    keep[regions[torn] - 1] = False
    return regions, keep


def _attach_empty(side: _Side) -> None:
    """Give tokens without bytes the region of a neighbour in their example."""
    targets = np.flatnonzero(side.empty)
    sources = np.flatnonzero(side.filled & ~side.closing)
    if not len(targets) or not len(sources):
        return
    at = np.searchsorted(sources, targets)
    for neighbour, inside in (
        (sources[np.maximum(at - 1, 0)], at > 0),
        (sources[np.minimum(at, len(sources) - 1)], at < len(sources)),
    ):
        fits = inside & (side.example[neighbour] == side.example[targets])
        side.region[targets[fits]] = side.region[neighbour[fits]]


def _split(
    left: _Side, right: _Side, group_of: _Ints, before: _Ints, base: npt.NDArray[np.int64]
) -> list[ExampleAlignment]:
    """Per-example arrays, with ids and offsets that start at 0 in each example."""
    total = int(before[-1])
    groups = [group_of[side.region] for side in (left, right)]
    single = np.ones(total, np.bool_)
    for group in groups:
        single &= np.bincount(group[group >= 0], minlength=total) == 1
    paired = [np.flatnonzero((group >= 0) & np.append(single, False)[group]) for group in groups]
    cuts = [np.cumsum(side.sizes)[:-1] for side in (left, right)]
    local = [
        np.split(np.where(group >= 0, group - before[side.example], -1).astype(np.int32), cut)
        for group, side, cut in zip(groups, (left, right), cuts, strict=True)
    ]
    ends = [
        np.split((side.end - base[side.example]).astype(np.int32), cut)
        for side, cut in zip((left, right), cuts, strict=True)
    ]
    firsts = [np.concatenate(([0], cut)) for cut in cuts]
    owner = left.example[paired[0]]
    pairs = np.stack(
        [tokens - first[owner] for tokens, first in zip(paired, firsts, strict=True)], axis=1
    ).astype(np.int32)
    pair_parts = np.split(pairs, np.searchsorted(owner, np.arange(1, len(left.sizes))))
    return [
        ExampleAlignment(student, teacher, student_end, teacher_end, pair_part, int(count))
        for student, teacher, student_end, teacher_end, pair_part, count in zip(
            *local, *ends, pair_parts, np.diff(before), strict=True
        )
    ]
