"""How the models read a few records of each file, to look at before training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Group

from dskd_lightning.alignment.exact import align
from dskd_lightning.alignment.token_bytes import token_bytes, token_text
from dskd_lightning.data.prepared import RenderedExample
from dskd_lightning.data.preview_rendering import as_html, as_terminal
from dskd_lightning.data.views import ExampleView
from dskd_lightning.structures import IGNORE_INDEX

__all__ = ["DataPreview", "FilePreview", "Lengths", "Reading", "RecordPreview", "StagePreview", "TurnReading"]

TokenState = Literal["exact", "group", "none"]


@dataclass(frozen=True)
class TurnReading:
    """What one model reads before one response, and the response's tokens.

    Args:
        prompt: text of the tokens before it.
        tokens: text of each token that is learnt, spaces and control characters made visible; none
            where the response is to be predicted.
        groups: per token, its byte-exact group with the other side, or -1; the student's with the first
            teacher, a teacher's with the student. Empty where no teacher is there.
        states: per token, ``exact`` (one token of the other side covers the same bytes), ``group``
            (several do) or ``none``.
    """

    prompt: str
    tokens: tuple[str, ...]
    groups: tuple[int, ...] = ()
    states: tuple[TokenState, ...] = ()


@dataclass(frozen=True)
class Reading:
    """One model's reading of a record.

    Args:
        tokens: how many it has.
        turns: one for each response that is learnt.
    """

    tokens: int
    turns: tuple[TurnReading, ...]


@dataclass(frozen=True)
class RecordPreview:
    """One record as all models read it, the student first."""

    place: str
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class FilePreview:
    """A file's number of examples, and the first of them."""

    name: str
    examples: int
    records: tuple[RecordPreview, ...]


@dataclass(frozen=True)
class Lengths:
    """Tokens of one model's examples, and the share of them that is learnt."""

    shortest: int
    median: int
    longest: int
    total: int
    response_share: float


@dataclass(frozen=True)
class StagePreview:
    """One stage.

    Args:
        counts: records read and used, what was cut or left out, fields that nothing reads.
        lengths: one per model, the student first.
        files: in the order of the data.
    """

    counts: dict[str, int]
    lengths: tuple[Lengths, ...]
    files: tuple[FilePreview, ...]


@dataclass(frozen=True)
class DataPreview:
    """What `InstructionDataModule.preview` found; a notebook shows it as HTML.

    Args:
        models: what to call the student and each teacher.
        stages: by name.
    """

    models: tuple[str, ...]
    stages: dict[str, StagePreview]

    @classmethod
    def of(
        cls,
        models: Sequence[str],
        tokenizers: Sequence[Any],
        stages: Iterable[tuple[str, ExampleView, dict[str, int]]],
        records: int,
    ) -> DataPreview:
        """The preview of prepared ``stages`` and what was counted, with so many ``records`` of each file."""
        return cls(
            tuple(models),
            {
                stage: StagePreview(
                    {name: number for name, number in report.items() if number},
                    tuple(_lengths(view, model) for model in range(len(models))),
                    tuple(_files(view, tokenizers, records)),
                )
                for stage, view, report in stages
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """The same in plain types, whole where the tables shorten it."""
        return asdict(self)

    def rich(self) -> Group:
        """Tables for the terminal; nothing of the data steers it."""
        return as_terminal(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def _lengths(view: ExampleView, model: int) -> Lengths:
    tokens = view.dataset.lengths[view.indices, model] + 1
    learnt = int(view.dataset.response_tokens(model)[view.indices].sum())
    total = int(tokens.sum())
    return Lengths(int(tokens.min()), int(np.median(tokens)), int(tokens.max()), total, learnt / total)


def _files(view: ExampleView, tokenizers: Sequence[Any], records: int) -> Iterator[FilePreview]:
    names, of_row = view.dataset.sources()
    mine = of_row[view.indices]
    for number, name in enumerate(names):
        rows = view.indices[mine == number]
        if len(rows):
            shown = [_record(view, int(row), tokenizers) for row in rows[:records]]
            yield FilePreview(name, len(rows), tuple(shown))


def _record(view: ExampleView, row: int, tokenizers: Sequence[Any]) -> RecordPreview:
    example = view.row(row)
    rendered = [view.dataset.rendered(row, model) for model in range(len(tokenizers))]
    sides = [
        list(_turns(tokens, tokenizer, example.response is not None))
        for tokens, tokenizer in zip(rendered, tokenizers, strict=True)
    ]
    readings = [[TurnReading(prompt, tokens) for prompt, tokens in side] for side in sides]
    for teacher in range(len(tokenizers) - 1, 0, -1):  # the student's marks are those of the first one
        spans = zip(rendered[0].spans, rendered[teacher].spans, strict=False)
        for turn, (mine, theirs) in enumerate(spans):
            found = align(mine, theirs)
            groups = [found.student_group.tolist(), found.teacher_group.tolist()]
            for at, (own, other) in ((0, groups), (teacher, groups[::-1])):
                reading = readings[at][turn]
                if reading.tokens:
                    states = tuple(_state(group, own, other) for group in own)
                    readings[at][turn] = TurnReading(reading.prompt, reading.tokens, tuple(own), states)
    return RecordPreview(
        example.place,
        tuple(
            Reading(len(tokens) + 1, tuple(turns)) for tokens, turns in zip(rendered, readings, strict=True)
        ),
    )


def _state(group: int, own: list[int], other: list[int]) -> TokenState:
    if group < 0:
        return "none"
    return "exact" if own.count(group) == other.count(group) == 1 else "group"


def _turns(tokens: RenderedExample, tokenizer: Any, answered: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Prompt and response tokens of each turn, as text."""
    pieces = token_bytes(tokenizer).pieces
    ids = [*tokens.input_ids.tolist(), int(tokens.labels[-1])]
    learnt = [False, *(label != IGNORE_INDEX for label in tokens.labels.tolist())]
    sizes = [len(spans) for spans in tokens.spans]
    starts, position = [], 0
    for size in sizes:
        position = learnt.index(True, position)
        starts.append(position)
        position += size
    ends = [0, *(start + size for start, size in zip(starts, sizes, strict=True))]
    for number, ((before, _), start, size) in enumerate(
        zip(itertools.pairwise(ends), starts, sizes, strict=True)
    ):
        prompt = b"".join(pieces[token] for token in ids[before:start]).decode(errors="replace")
        hidden = not answered and number == len(sizes) - 1
        response = () if hidden else tuple(token_text(pieces[token]) for token in ids[start : start + size])
        yield prompt, response
