"""What a set of sources holds, one record after another, and the examples in the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dskd_lightning.data.examples import Example, InvalidRecord
from dskd_lightning.data.formats import DetectedFormat, detect_format, parse_record
from dskd_lightning.data.read_share import ReadShare
from dskd_lightning.data.rendering import PreparationSettings
from dskd_lightning.data.sources import Source

__all__ = ["RawRecord", "parsed", "read_examples", "read_records"]


class RawRecord(NamedTuple):
    """A record that nobody has looked into: what is left of reading for another process to do.

    Args:
        value: what one line or row of a file holds.
        format: how its fields are named.
        source: its file.
        line: its line in that file, or row.
    """

    value: Any
    format: DetectedFormat
    source: str
    line: int


def read_records(
    sources: Sequence[Source],
    settings: PreparationSettings,
    counts: Counter[str],
    share: ReadShare | None = None,
) -> Iterator[RawRecord | Example]:
    """Records of all sources, to be `parsed`, until ``settings.limit`` examples are in them.

    Those of files come as they are. Others, whose values perhaps can't be sent to another process, and
    those that must be counted as examples or not, are parsed here.

    Args:
        sources: to read.
        settings: what is expected of them.
        counts: filled as they pass.
        share: told how much of the sources is read.

    Raises:
        UserError: an unreadable source or, unless ``skip_invalid``, a record that is malformed or, where
            it is parsed here, invalid.
    """
    used = 0

    def skip(error: InvalidRecord) -> None:
        counts["read"] += 1
        counts[f"skipped: {error.reason}"] += 1

    for source in sources:
        if share is not None:
            share.next_source()
        format: DetectedFormat | None = None if settings.format == "auto" else settings.format
        at_once = not source.is_file or (settings.limit is not None and settings.skip_invalid)
        for record in source.records(skip if settings.skip_invalid else None, share):
            if settings.limit is not None and used >= settings.limit:
                return
            counts["read"] += 1
            if format is None and isinstance(record.value, dict):
                format = detect_format(record.value, record.source)
            raw = RawRecord(record.value, format or "alpaca", record.source, record.line)
            found = parsed(raw, settings, counts) if at_once else raw
            if found is not None:
                used += 1
                yield found


def parsed(
    record: RawRecord | Example, settings: PreparationSettings, counts: Counter[str]
) -> Example | None:
    """The example in ``record``, None for an invalid one under ``skip_invalid``.

    ``counts`` learns what is lost.

    Raises:
        InvalidRecord: it can't be learnt from, unless ``skip_invalid``.
    """
    if isinstance(record, Example):
        return record
    unused: Counter[str] = Counter()
    try:
        example = parse_record(
            record.value, record.format, record.source, record.line,
            needs_response=settings.needs_response, unused=unused, teachers=settings.teachers,
        )  # fmt: skip
    except InvalidRecord as error:
        if not settings.skip_invalid:
            raise
        counts[f"skipped: {error.reason}"] += 1
        return None
    for field, number in unused.items():
        counts[f"unused field '{field}' of {record.source}"] += number
    return example.with_system(settings.system)


def read_examples(
    sources: Sequence[Source], settings: PreparationSettings, counts: Counter[str]
) -> Iterator[Example]:
    """Examples of all sources, at most ``settings.limit``; ``counts`` is filled as they pass.

    Raises:
        UserError: an unreadable source or, unless ``skip_invalid``, an invalid record.
    """
    for record in read_records(sources, settings, counts):
        if (example := parsed(record, settings, counts)) is not None:
            yield example
