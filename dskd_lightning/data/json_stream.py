"""JSON Lines and JSON arrays, one record at a time, so that memory doesn't grow with the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from dskd_lightning.data.compressed import kind_of, not_utf8, open_text
from dskd_lightning.data.examples import InvalidRecord
from dskd_lightning.data.read_share import ReadShare, told
from dskd_lightning.data.remote import DataFile
from dskd_lightning.errors import UserError

__all__ = ["Skip", "iter_json", "leave_out"]

_CHUNK = 1 << 20

Skip = Callable[[InvalidRecord], None]


def leave_out(error: InvalidRecord, skip: Skip | None) -> None:
    """Tell ``skip`` of a record that can't be read; None raises its error."""
    if skip is None:
        raise error
    skip(error)


def iter_json(
    path: DataFile, skip: Skip | None = None, share: ReadShare | None = None
) -> Iterator[tuple[int, Any]]:
    """Line (from 1) and value of each record of a ``.json`` or ``.jsonl`` file.

    A file that starts with ``[`` is an array of records, any other has one record a line or is a
    single object that holds the array under ``data``.

    Args:
        path: the file.
        skip: called with the error of a line or an item that is malformed or isn't UTF-8, which is then
            left out; None raises it. Malformed JSON in an array is raised: what follows it can't be found.
        share: told how much of the file is read.

    Raises:
        UserError: malformed JSON, with its line.
    """
    with open_text(path) as file:
        first = file.read(1)
        while first and first.isspace():
            first = file.read(1)
    if first != "[" and kind_of(path) == ".json" and _is_one_object(path):
        with open_text(path) as file:
            yield from _object(path, file.read(), share)
        return
    with open_text(path, share=share) as file:  # from its beginning; packed ones can't go back
        yield from _array(path, file, skip) if first == "[" else _lines(path, file, skip)


def _is_one_object(path: DataFile) -> bool:
    """Whether the file is one object, on one line or many, rather than a record on each line."""
    with open_text(path) as file:
        line = next((line for line in file if line.strip()), "")
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return True
        return not any(more.strip() for more in file)


def _malformed(path: DataFile, line: int, error: ValueError | RecursionError) -> InvalidRecord:
    if not isinstance(error, json.JSONDecodeError):  # Python's own limits on depth and digits
        what = "is nested too deep" if isinstance(error, RecursionError) else f"can't be read ({error})"
        return InvalidRecord(f"The JSON at {path}:{line} {what}: correct that record.", "malformed JSON")
    return InvalidRecord(
        f"Malformed JSON at {path}:{line} ({error.msg}, column {error.colno}): correct that line.",
        "malformed JSON",
    )


def _lines(path: DataFile, file: TextIO, skip: Skip | None) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        if (foreign := not_utf8(path, number, line)) is not None:
            leave_out(foreign, skip)
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            leave_out(_malformed(path, number, error), skip)
            continue
        yield number, value


def _object(path: DataFile, text: str, share: ReadShare | None) -> Iterator[tuple[int, Any]]:
    if (foreign := not_utf8(path, 1, text)) is not None:
        raise foreign
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, getattr(error, "lineno", 1), error) from error
    records = value.get("data") if isinstance(value, dict) else None
    if isinstance(records, list):
        yield from told(enumerate(records, 1), len(records), share)
    else:
        yield 1, value


def _array(path: DataFile, file: TextIO, skip: Skip | None) -> Iterator[tuple[int, Any]]:
    """Decode item after item from a buffer that is refilled where an item isn't complete."""
    decoder = json.JSONDecoder()
    buffer, line, ended, expected = file.read(_CHUNK).lstrip("\ufeff"), 1, False, "["
    position = 0
    while True:
        start, expected = _skip(buffer, position, expected)
        line += buffer.count("\n", position, start)
        position = start
        if buffer[position : position + 1] == "]":
            if (buffer[position + 1 :] + file.read()).strip():
                raise UserError(f"{path}:{line} has text after the closing bracket of its array: remove it.")
            return
        try:
            if expected and position < len(buffer):
                raise json.JSONDecodeError(f"Expecting '{expected}' or ']'", buffer, position)
            value, end = decoder.raw_decode(buffer, position)
            complete = end < len(buffer) or ended  # a number may go on in the next chunk
        except json.JSONDecodeError as error:
            if ended:
                bad = line + buffer.count("\n", position, error.pos)
                raise _malformed(path, bad, error) from error
            complete = False
        except (ValueError, RecursionError) as error:
            raise _malformed(path, line, error) from error
        if not complete:
            more = file.read(max(_CHUNK, len(buffer) - position))
            buffer, position, ended = buffer[position:] + more, 0, not more
            continue
        if (foreign := not_utf8(path, line, buffer[position:end])) is None:
            yield line, value
        else:
            leave_out(foreign, skip)
        line += buffer.count("\n", position, end)
        position, expected = end, ","


def _skip(buffer: str, position: int, expected: str) -> tuple[int, str]:
    """Position past whitespace and one ``expected`` character, and that character while it is still due."""
    while position < len(buffer) and (buffer[position].isspace() or buffer[position] == expected):
        if buffer[position] == expected:
            expected = ""
        position += 1
    return position, expected
