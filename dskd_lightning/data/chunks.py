"""Chunks of records, and what each becomes: Arrow record batches as bytes, the same whoever makes them."""

from __future__ import annotations

import functools
import gc
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.examples import Example
from dskd_lightning.data.reading import RawRecord, parsed
from dskd_lightning.data.rendering import PreparationSettings, render_examples

__all__ = ["RenderedChunk", "chunked", "file_names", "render_chunk", "schemas"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_RECORDS = 512
_CHARACTERS = 2**21
"""Where a chunk ends, whichever comes first: a few long documents are as much work as many conversations."""


@dataclass(frozen=True)
class RenderedChunk:
    """What is written of one chunk.

    Args:
        messages: one per file of `file_names`, the record batch as a message of an Arrow stream; empty
            where ``rows`` is 0.
        rows: of each record batch.
        lengths: ``rows * models`` tokens that each model reads of each row.
        records: that went into the chunk.
        counts: what was unused, cut and left out.
    """

    messages: tuple[bytes, ...]
    rows: int
    lengths: array[int]
    records: int
    counts: Counter[str]


def file_names(models: int) -> list[str]:
    """The Arrow streams of a prepared dataset: the examples, then a file per model."""
    return ["examples.arrow", *(f"model-{i}.arrow" for i in range(models))]


def schemas(models: int) -> list[Any]:
    """The schema of each of `file_names`."""
    return [_example_schema(), *(_model_schema() for _ in range(models))]


def chunked(records: Iterable[RawRecord | Example]) -> Iterator[list[RawRecord | Example]]:
    """Lists of consecutive records, whose borders follow from the records alone."""
    following = iter(records)
    while chunk := _first_chunk(following):
        yield chunk


def _uncollected(work: Callable[_P, _R]) -> Callable[_P, _R]:
    """``work`` without the garbage collector, which walks over what a chunk has made again and again."""

    @functools.wraps(work)
    def working(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not gc.isenabled():
            return work(*args, **kwargs)
        gc.disable()
        try:
            return work(*args, **kwargs)
        finally:
            gc.enable()

    return working


@_uncollected
def _first_chunk(records: Iterator[RawRecord | Example]) -> list[RawRecord | Example]:
    chunk: list[RawRecord | Example] = []
    characters = 0
    for record in records:
        chunk.append(record)
        characters += _characters(record)
        if len(chunk) >= _RECORDS or characters >= _CHARACTERS:
            break
    return chunk


def _characters(record: RawRecord | Example) -> int:
    if isinstance(record, Example):
        return sum(len(message.content) for message in record.messages)
    return _size(record.value)


def _size(value: Any) -> int:
    """Characters, or bytes, in all that ``value`` holds, however deep."""
    size, values = 0, [value]
    for held in values:
        if isinstance(held, str | bytes):
            size += len(held)
        elif isinstance(held, Mapping):
            values += held.values()
        elif isinstance(held, list):
            values += held
    return size


@_uncollected
def render_chunk(
    records: Sequence[RawRecord | Example],
    renderers: Sequence[ChatRenderer],
    settings: PreparationSettings,
) -> RenderedChunk:
    """Parse, render, cut and lay out what a chunk holds.

    Raises:
        InvalidRecord: one of the records can't be learnt from, unless ``skip_invalid``.
    """
    import pyarrow as pa

    counts: Counter[str] = Counter()
    lengths = array("i")  # 4 bytes a number
    columns: list[list[dict[str, Any]]] = [[] for _ in file_names(len(renderers))]
    found = (parsed(record, settings, counts) for record in records)
    examples = [example for example in found if example is not None]
    for _, piece, rows in render_examples(examples, renderers, settings, counts):
        lengths.extend(len(row["tokens"]) - 1 for row in rows)
        for column, row in zip(columns, [_example_row(piece), *rows], strict=True):
            column.append(row)
    messages = tuple(
        pa.RecordBatch.from_pylist(rows, schema=schema).serialize().to_pybytes() if rows else b""
        for rows, schema in zip(columns, schemas(len(renderers)), strict=True)
    )
    return RenderedChunk(messages, len(columns[0]), lengths, len(records), counts)


def _example_row(example: Example) -> dict[str, Any]:
    """As `dataclasses.asdict`, which copies every text."""
    messages = {name: list(map(vars, getattr(example, name))) for name in ("messages", "teacher_messages")}
    return {**vars(example), **messages}


def _example_schema() -> Any:
    import pyarrow as pa

    message = pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("learnt", pa.bool_()),
            ("extra", pa.string()),
            ("special", pa.bool_()),
        ]
    )
    return pa.schema(
        [
            ("messages", pa.list_(message)),
            ("references", pa.list_(pa.string())),
            ("source", pa.string()),
            ("line", pa.int64()),
            ("tools", pa.string()),
            ("fields", pa.string()),
            ("teacher_messages", pa.list_(message)),
            ("teacher", pa.string()),
        ]
    )


def _model_schema() -> Any:
    import pyarrow as pa

    ints = pa.list_(pa.int32())
    fields = dict.fromkeys(("tokens", "prompts", "responses", "ends"), ints)
    return pa.schema({**fields, "flags": pa.list_(pa.uint8()), "bytes": ints, "normalized": pa.bool_()})
