"""Read, render and truncate a set of sources once, into a cache that later runs map."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.checked_files import blocks_of, damaged, write_report
from dskd_lightning.data.examples import Example, InvalidRecord, Message
from dskd_lightning.data.formats import DetectedFormat, Format, detect_format, parse_record
from dskd_lightning.data.prepared import PreparedDataset, conversation_row
from dskd_lightning.data.sources import Source
from dskd_lightning.data.truncation import truncate, windows
from dskd_lightning.errors import UserError
from dskd_lightning.runs.heartbeat import Progress

__all__ = ["PreparationSettings", "cache_key", "prepare", "read_examples", "render_example"]

_log = logging.getLogger(__name__)
_VERSION = 7  # of the files' layout and of the rendering
_CHUNK = 512
_UNFINISHED = ".preparing-"
_ABANDONED_AFTER = 24 * 3600  # seconds without a write


@dataclass(frozen=True)
class PreparationSettings:
    """What besides sources and tokenizers decides the prepared tokens.

    Args:
        format: of the records, or ``auto``.
        max_length: most tokens of an example.
        max_prompt_length: most tokens before its first response.
        system: system message for examples without one.
        limit: most examples; None for all.
        skip_invalid: leave out and count invalid records instead of stopping at the first.
        needs_response: False to predict.
        max_teacher_prompt_length: likewise for teachers, whose sequences may be longer by as much.
        teachers: names by which records choose one of several teachers.
    """

    format: Format = "auto"
    max_length: int = 512
    max_prompt_length: int = 256
    system: str | None = None
    limit: int | None = None
    skip_invalid: bool = False
    needs_response: bool = True
    max_teacher_prompt_length: int | None = None
    teachers: tuple[str, ...] = ()

    @property
    def teacher_room(self) -> int:
        """How many more tokens teachers' prompts and sequences may have than the student's."""
        return (self.max_teacher_prompt_length or self.max_prompt_length) - self.max_prompt_length


def cache_key(
    sources: Sequence[Source], renderers: Sequence[ChatRenderer], settings: PreparationSettings
) -> str:
    """Hash of the sources' content, the tokenizers, the templates and the settings."""
    content = [[source.name, source.fingerprint()] for source in sources]
    models = [r.fingerprint if r.system is None else [r.fingerprint, r.system] for r in renderers]
    parts = json.dumps([_VERSION, content, models, asdict(settings)], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def read_examples(
    sources: Sequence[Source], settings: PreparationSettings, counts: Counter[str]
) -> Iterator[Example]:
    """Examples of all sources, at most ``settings.limit``; ``counts`` is filled as they pass.

    Raises:
        UserError: an unreadable source or, unless ``skip_invalid``, an invalid record.
    """
    used = 0

    def skip(error: InvalidRecord) -> None:
        counts["read"] += 1
        counts[f"skipped: {error.reason}"] += 1

    for source in sources:
        format: DetectedFormat | None = None if settings.format == "auto" else settings.format
        for record in source.records(skip if settings.skip_invalid else None):
            if settings.limit is not None and used >= settings.limit:
                return
            counts["read"] += 1
            unused: Counter[str] = Counter()
            try:
                if format is None and isinstance(record.value, dict):
                    format = detect_format(record.value, record.source)
                example = parse_record(
                    record.value, format or "alpaca", record.source, record.line,
                    needs_response=settings.needs_response, unused=unused, teachers=settings.teachers,
                )  # fmt: skip
            except InvalidRecord as error:
                if not settings.skip_invalid:
                    raise
                counts[f"skipped: {error.reason}"] += 1
                continue
            used += 1
            for field, number in unused.items():
                counts[f"unused field '{field}' of {source.name}"] += number
            yield example.with_system(settings.system)


def prepare(
    sources: Sequence[Source],
    renderers: Sequence[ChatRenderer],
    settings: PreparationSettings,
    cache_dir: Path,
) -> PreparedDataset:
    """The prepared dataset, from the cache where it is there, else made now.

    Several processes may call this at once: each writes a folder of its own, and the first to
    rename it into place wins.

    Raises:
        UserError: a bad source or record, no example left, or a full or read-only disk.
    """
    folder = cache_dir / cache_key(sources, renderers, settings)
    if (folder / "report.json").is_file():
        return PreparedDataset(folder)
    if folder.exists():  # it is moved there whole
        raise damaged(folder / "report.json", "it is missing")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache_dir)
        with tempfile.TemporaryDirectory(
            dir=cache_dir, prefix=_UNFINISHED, ignore_cleanup_errors=True
        ) as new:
            with Progress(
                "Preparing " + ", ".join(source.name for source in sources), None, "examples"
            ) as beat:
                _write(Path(new), sources, renderers, settings, beat)
            try:
                os.replace(new, folder)
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
    except OSError as error:
        raise UserError(
            f"Can't write the data cache in '{cache_dir}' ({error.strerror or error}): free space there or "
            "set `cache_dir`."
        ) from error
    dataset = PreparedDataset(folder)
    _announce(dataset, sources)
    return dataset


def _remove_leftovers(cache_dir: Path) -> None:
    """What preparations that were killed have left; another process may be at work on younger ones."""
    for folder in cache_dir.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError):  # another process was faster
            written = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - written > _ABANDONED_AFTER:
                shutil.rmtree(folder, ignore_errors=True)


def _write(
    folder: Path,
    sources: Sequence[Source],
    renderers: Sequence[ChatRenderer],
    settings: PreparationSettings,
    progress: Progress,
) -> None:
    counts: Counter[str] = Counter()
    lengths = array("i")  # 4 bytes a number
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(_Writer(folder / f"{name}.arrow", schema))
            for name, schema in [
                ("examples", _example_schema()),
                *((f"model-{i}", _model_schema()) for i in range(len(renderers))),
            ]
        ]
        for example in read_examples(sources, settings, counts):
            progress.done += 1
            try:
                pieces = list(render_example(example, renderers, settings, counts))
            except InvalidRecord as error:
                if not settings.skip_invalid:
                    raise
                counts[f"skipped: {error.reason}"] += 1
                continue
            for piece, rows in pieces:
                lengths.extend(len(row["tokens"]) - 1 for row in rows)
                for writer, row in zip(writers, [asdict(piece), *rows], strict=True):
                    writer.add(row)
    counts["used"] = len(lengths) // len(renderers)
    if not lengths:
        names = ", ".join(source.name for source in sources)
        raise UserError(
            f"No example is left of {names} ({_listed(counts)}): check the files and the lengths."
        )
    np.save(folder / "lengths.npy", np.array(lengths, np.int32).reshape(-1, len(renderers)))
    streams = {writer.path.name: blocks_of(writer.path, writer.batches) for writer in writers}
    write_report(folder / "report.json", counts, [folder / "lengths.npy"], streams)


def render_example(
    example: Example,
    renderers: Sequence[ChatRenderer],
    settings: PreparationSettings,
    counts: Counter[str],
) -> Iterator[tuple[Example, list[dict[str, Any]]]]:
    """``example`` as the models read it, and its tokens for each of them as `rendered_example` takes them.

    Nothing where not one token of the response has room, a pair for each window of a document;
    ``counts`` learns what was cut.
    """
    if example.is_document:
        yield from _windows(example, renderers, settings, counts)
        return
    example = _as_models_read(example, renderers, counts)
    learnt = example if example.response is not None else _with_placeholder(example)
    if example.teacher_messages and renderers[0].learn == "everything":
        raise InvalidRecord(
            f"The record at {example.place} has 'teacher_messages', which the student can't learn: drop "
            "them, or `learn: everything`.",
            "'teacher_messages' under learn: everything",
        )
    teachers = [learnt.for_teacher(renderer.system) for renderer in renderers[1:]]
    if any(renderer.template.drops_reasoning for renderer in renderers):
        teachers = [teacher.without_earlier_reasoning() for teacher in teachers]
    rendered = [renderer.render(read) for renderer, read in zip(renderers, [learnt, *teachers], strict=True)]
    starts = [renderer.bos_ids for renderer in renderers]
    cut = truncate(rendered, settings.max_length, settings.max_prompt_length, starts, settings.teacher_room)
    counts["truncated prompts"] += cut.prompt
    counts["truncated responses"] += cut.response
    counts["skipped: no room for the response"] += not cut.conversations
    if cut.conversations:
        yield example, [conversation_row(conversation) for conversation in cut.conversations]


def _windows(
    example: Example,
    renderers: Sequence[ChatRenderer],
    settings: PreparationSettings,
    counts: Counter[str],
) -> Iterator[tuple[Example, list[dict[str, Any]]]]:
    text = example.messages[0].content
    content, documents = text.encode(), [renderer.render(example).turns[0] for renderer in renderers]
    for window in windows(documents, text, settings.max_length):
        if not window.conversations:
            counts["skipped: no window of a document fits"] += 1
            continue
        piece = Message("assistant", content[window.start : window.end].decode())
        rows = [conversation_row(conversation) for conversation in window.conversations]
        yield replace(example, messages=(piece,)), rows


def _as_models_read(example: Example, renderers: Sequence[ChatRenderer], counts: Counter[str]) -> Example:
    """The one text of every response that all models read, the student's way of calling tools in it."""
    if any(renderer.template.drops_reasoning for renderer in renderers):
        kept = example.without_earlier_reasoning()
        counts["examples without the reasoning of earlier answers"] += kept is not example
        example = kept
    everything = renderers[0].learn == "everything"
    learnt = [m.content for m in example.messages if everything or m.role == "assistant"]
    outer = any(content != content.strip() for content in learnt)
    counts["responses without their outer whitespace"] += outer
    return renderers[0].template.spelled_out(example)


def _with_placeholder(example: Example) -> Example:
    return replace(example, messages=(*example.messages, Message("assistant", "?")))


class _Writer:
    """Rows into an Arrow stream, a chunk in memory at a time."""

    def __init__(self, path: Path, schema: Any) -> None:
        self.path, self._schema, self._rows = path, schema, list[dict[str, Any]]()
        self.batches: list[int] = []  # rows of each record batch so far

    def __enter__(self) -> _Writer:
        import pyarrow as pa

        self._file = pa.OSFile(str(self.path), "wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)
        return self

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._stream.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
            self.batches.append(len(self._rows))
            self._rows.clear()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
            self._stream.close()
        finally:
            self._file.close()


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


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in counts.items())


def _announce(dataset: PreparedDataset, sources: Sequence[Source]) -> None:
    report = dataset.report
    report = {name: number for name, number in report.items() if number}
    lost = any(number for name, number in report.items() if name not in ("read", "used"))
    names = ", ".join(source.name for source in sources)
    _log.log(logging.WARNING if lost else logging.INFO, "%s: %s.", names, _listed(report))
