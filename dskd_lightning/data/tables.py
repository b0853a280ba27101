"""CSV and Parquet files, some rows at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from typing import Any

from dskd_lightning.data.compressed import not_utf8, open_text
from dskd_lightning.data.examples import InvalidRecord
from dskd_lightning.data.json_stream import Skip, leave_out
from dskd_lightning.data.read_share import ReadShare
from dskd_lightning.data.remote import DataFile, RemoteFile
from dskd_lightning.errors import UserError

__all__ = ["ROWS", "iter_csv", "iter_parquet", "rows_of"]

ROWS = 1024
"""That are in memory together."""


def rows_of(columns: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of columns of the same length."""
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def iter_parquet(path: DataFile, share: ReadShare | None = None) -> Iterator[tuple[int, Any]]:
    """Number from 1 and value of each row.

    Args:
        path: the file.
        share: told how much of the file is read.

    Raises:
        UserError: the file isn't what its name says.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        line = 0
        with pq.ParquetFile(path.open(anywhere=True) if isinstance(path, RemoteFile) else path) as file:
            if share is not None:
                share.follow_rows(lambda: line, file.metadata.num_rows)
            for batch in file.iter_batches(ROWS):
                for value in batch.to_pylist():
                    line += 1
                    yield line, value
    except pa.ArrowInvalid as error:
        raise UserError(f"'{path}' is no readable Parquet file: {error}.") from error


def iter_csv(path: DataFile, skip: Skip | None, share: ReadShare | None = None) -> Iterator[tuple[int, Any]]:
    """Line and value of each row, whose keys are in the first one.

    Args:
        path: the file.
        skip: called with the error of a row that is malformed, which is then left out; None raises it.
        share: told how much of the file is read.

    Raises:
        UserError: it can't be read as CSV, or a row is malformed.
    """
    csv.field_size_limit(1 << 30)
    try:
        with open_text(path, newline="", share=share) as file:
            reader = csv.DictReader(file)
            if (foreign := not_utf8(path, 1, "".join(reader.fieldnames or ()))) is not None:
                raise foreign
            for row in reader:
                error = _fault(path, reader.line_num, row)
                if error is None:
                    yield reader.line_num, {key: _cell(key, value) for key, value in row.items()}
                else:
                    leave_out(error, skip)
    except csv.Error as error:
        raise UserError(f"'{path}' is no readable CSV file: {error}.") from error


def _fault(path: DataFile, line: int, row: Mapping[str | None, Any]) -> InvalidRecord | None:
    if None in row or any(value is None for value in row.values()):
        return InvalidRecord(
            f"{path}:{line} has another number of columns than the header: quote its commas.",
            "another number of columns",
        )
    return not_utf8(path, line, "".join(row.values()))


def _cell(key: str, value: str) -> Any:
    """Conversations in a CSV cell are JSON; everything else is text."""
    if key in ("messages", "conversations", "tools", "history"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):  # malformed, or beyond Python's limits
            return value
    return value
