"""Rendered examples on disk: Arrow files, memory-mapped, so that memory doesn't grow with them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dskd_lightning.alignment.byte_spans import ByteSpans
from dskd_lightning.data.chat import RenderedConversation
from dskd_lightning.data.checked_files import ArrowRows, ChainedRows, read_array, read_report
from dskd_lightning.data.examples import Example, Message
from dskd_lightning.data.open_files import allow_open_files
from dskd_lightning.structures import IGNORE_INDEX

__all__ = ["PreparedDataset", "RenderedExample", "conversation_row", "rendered_example"]

_Ints = npt.NDArray[np.int32]
_UNKNOWN, _ADDED, _END = map(np.uint8, (1, 2, 4))


@dataclass(frozen=True)
class RenderedExample:
    """One example's tokens for one model.

    Args:
        input_ids: ``[length]``, without the last token, which predicts nothing.
        labels: ``[length]``, the token after each position where that belongs to a response, else
            `IGNORE_INDEX`.
        spans: per assistant turn, the bytes that each response token covers.
    """

    input_ids: _Ints
    labels: _Ints
    spans: tuple[ByteSpans, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def response(self) -> npt.NDArray[np.intp]:
        """``[n]``, the positions that predict a response token."""
        return np.flatnonzero(self.labels != IGNORE_INDEX)


def conversation_row(conversation: RenderedConversation) -> dict[str, Any]:
    """One model's rendering as a row of lists and arrays."""
    turns = conversation.turns
    return {
        "tokens": list(chain(*(ids for turn in turns for ids in (turn.prompt_ids, turn.response_ids)))),
        "prompts": [len(turn.prompt_ids) for turn in turns],
        "responses": [len(turn.response_ids) for turn in turns],
        "ends": _joined([turn.spans.ends for turn in turns]),
        "flags": _joined([_flags(turn.spans) for turn in turns]),
        "bytes": [turn.spans.length for turn in turns],
        "normalized": any(turn.spans.normalized for turn in turns),
    }


def _joined(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _flags(spans: ByteSpans) -> npt.NDArray[np.uint8]:
    unknown, added, end = (kind.view(np.uint8) for kind in (spans.unknown, spans.added, spans.end))
    return unknown * _UNKNOWN | added * _ADDED | end * _END


def rendered_example(row: dict[str, Any]) -> RenderedExample:
    """The tokens of a row of `conversation_row`, or of one read back from the disk."""
    tokens, ends = (np.asarray(row[name], np.int32) for name in ("tokens", "ends"))
    flags = np.asarray(row["flags"], np.uint8)
    counts = [np.asarray(row[name]).tolist() for name in ("prompts", "responses", "bytes")]
    labels = np.full(len(tokens) - 1, IGNORE_INDEX, np.int32)
    spans, position, used = [], 0, 0
    for prompt, response, length in zip(*counts, strict=True):
        position += prompt
        labels[position - 1 : position + response - 1] = tokens[position : position + response]
        position += response
        end, flag = ends[used : used + response], flags[used : used + response]
        used += response
        start = np.concatenate((np.zeros(min(1, response), np.int32), end[:-1]))
        spans.append(
            ByteSpans(
                start, end, (flag & _UNKNOWN) > 0, (flag & _ADDED) > 0, (flag & _END) > 0,
                length, bool(row["normalized"]),
            )
        )  # fmt: skip
    return RenderedExample(tokens[:-1], labels, tuple(spans))


class PreparedDataset:
    """What `prepare` wrote for one set of sources and one tuple of models.

    Args:
        folder: the cache folder; its name is the fingerprint of content, tokenizers and settings.
        more: those of the sources that follow, where these are prepared apart.

    Raises:
        UserError: a file is missing or damaged; damage within the large ones shows where it is read.
    """

    def __init__(self, folder: Path, *more: Path) -> None:
        self.folder = folder
        parts = [(part, *read_report(part / "report.json")) for part in (folder, *more)]
        self.fingerprint = folder.name
        if more:
            names = " ".join(part.name for part in (folder, *more))
            self.fingerprint = hashlib.sha256(names.encode()).hexdigest()[: len(folder.name)]
        self.report: dict[str, int] = {}
        for _, counts, _, _ in parts:
            self.report |= {name: self.report.get(name, 0) + number for name, number in counts.items()}
        lengths = [read_array(part / "lengths.npy", arrays["lengths.npy"]) for part, _, arrays, _ in parts]
        self.lengths: _Ints = np.concatenate(lengths)

        allow_open_files(self, len(parts) * (1 + self.lengths.shape[1]))

        def rows(name: str) -> ArrowRows | ChainedRows:
            files = [ArrowRows(part / name, streams[name]) for part, _, _, streams in parts]
            return ChainedRows(files) if more else files[0]

        self._examples = rows("examples.arrow")
        self._models = [rows(f"model-{i}.arrow") for i in range(self.lengths.shape[1])]

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, index: int) -> Example:
        """The raw example in row ``index``."""
        chunk, at = self._examples.row(index)
        row = {name: chunk.column(name)[at].as_py() for name in chunk.schema.names}
        for name in ("messages", "teacher_messages"):
            row[name] = tuple(Message(**message) for message in row[name])
        return Example(**{**row, "references": tuple(row["references"])})

    def rendered(self, index: int, model: int = 0) -> RenderedExample:
        """Tokens of row ``index`` for the student (0) or teacher ``model - 1``."""
        chunk, at = self._models[model].row(index)
        row = {}
        for name in chunk.schema.names:
            value = chunk.column(name)[at]
            row[name] = value.as_py() if name == "normalized" else value.values.to_numpy(zero_copy_only=True)
        return rendered_example(row)

    def response_tokens(self, model: int = 0) -> npt.NDArray[np.int64]:
        """``[examples]``, tokens that the student (0) or teacher ``model - 1`` learns of each example."""
        counts = [
            sum(row)
            for chunk in self._models[model].chunks()
            for row in chunk.column("responses").to_pylist()
        ]
        return np.array(counts, np.int64)

    def sources(self) -> tuple[list[str], npt.NDArray[np.intp]]:
        """Names of the files, and ``[examples]``, which of them each example is from."""
        return self._coded("source")

    def _coded(self, column: str) -> tuple[list[str], npt.NDArray[np.intp]]:
        """The texts in a column of the examples, and ``[examples]``, which of them each has."""
        names: dict[str, int] = {}
        rows = [np.zeros(0, np.intp)]
        for chunk in self._examples.chunks():
            found = chunk.column(column).dictionary_encode()
            numbers = [names.setdefault(name, len(names)) for name in found.dictionary.to_pylist()]
            rows.append(np.array(numbers, np.intp)[found.indices.to_numpy()])
        return list(names), np.concatenate(rows)

    def first_document(self, rows: npt.NDArray[np.intp]) -> int | None:
        """The first of ``rows``, all with a response, that is a text without a prompt; or None."""
        turns = [chunk.column("messages").value_lengths().to_numpy() for chunk in self._examples.chunks()]
        found = rows[np.concatenate(turns)[rows] == 1]
        return int(found[0]) if len(found) else None

    def teachers(self, names: Sequence[str | None]) -> npt.NDArray[np.int16] | None:
        """``[examples]``, number in ``names`` of the only teacher of each, -1 where all answer.

        None where no example names one.
        """
        if not any(names):
            return None
        numbers = {name: number for number, name in enumerate(names) if name}
        found, codes = self._coded("teacher")
        routes = np.array([numbers.get(name, -1) for name in found], np.int16)[codes]
        return routes if (routes >= 0).any() else None

    def answered_by(self, teacher: int, names: Sequence[str | None]) -> npt.NDArray[np.bool_]:
        """``[examples]``, whether ``teacher`` answers for each."""
        routes = self.teachers(names)
        if routes is None:
            return np.ones(len(self), bool)
        return (routes == -1) | (routes == teacher)

    def longest(self, indices: Sequence[int] | npt.NDArray[np.intp]) -> _Ints:
        """``[examples]``, tokens of each example for the model that needs most."""
        longest: _Ints = self.lengths[np.asarray(indices, np.intp)].max(axis=1)
        return longest
