"""The examples of a set of sources, one after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from dskd_lightning.data.examples import Example, InvalidRecord
from dskd_lightning.data.formats import DetectedFormat, detect_format, parse_record
from dskd_lightning.data.rendering import PreparationSettings
from dskd_lightning.data.sources import Source

__all__ = ["read_examples"]


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
