"""Prepared data in the making: chunks are appended, and what a killed process has finished is kept."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from dskd_lightning.data.checked_files import Blocks, write_report
from dskd_lightning.data.chunks import RenderedChunk, file_names, schemas
from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object, replacing, sealed

__all__ = ["PartialDataset"]

_log = logging.getLogger(__name__)
_LENGTHS, _JOURNAL = "lengths.raw", "journal.json"
_END = b"\xff\xff\xff\xff\0\0\0\0"
"""The end of an Arrow stream."""
_EVERY, _SECONDS = 64, 10.0
"""Chunks, or time, between two entries in the journal; what came after the last one is done again."""


class PartialDataset:
    """The files of a prepared dataset while chunks are appended to them.

    Args:
        folder: of this dataset alone; what an earlier process has left there is gone on with.
        models: student and teachers.
    """

    def __init__(self, folder: Path, models: int) -> None:
        self.folder, self.models = folder, models
        self._files: dict[str, BinaryIO] = {}
        self._begin()

    def _begin(self) -> None:
        self.chunks = 0
        """Appended so far; those that an earlier process appended needn't be rendered again."""
        self.records = 0
        """That went into those chunks."""
        self.counts: Counter[str] = Counter()
        self._starts = {name: [0] for name in file_names(self.models)}
        self._crc32: dict[str, list[int]] = {name: [] for name in file_names(self.models)}
        self._rows: list[int] = []
        self._noted = time.monotonic()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._resume()
        except (OSError, UserError, KeyError, TypeError, ValueError):  # none, or not what was written
            self._begin()
            self._open(dict.fromkeys((*file_names(self.models), _LENGTHS), 0))
            for name, schema in zip(file_names(self.models), schemas(self.models), strict=True):
                self._append(name, schema.serialize().to_pybytes())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk; what is on it is in the journal
            if isinstance(error, UserError):  # of a server or a file that is there again later
                self._note()
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()

    def append(self, chunk: RenderedChunk) -> None:
        """The next chunk."""
        if chunk.rows:
            for name, message in zip(file_names(self.models), chunk.messages, strict=True):
                self._append(name, message)
            self._rows.append(chunk.rows)
            self._files[_LENGTHS].write(chunk.lengths.tobytes())
        self.chunks += 1
        self.records += chunk.records
        self.counts.update(chunk.counts)
        if self.chunks % _EVERY == 0 or time.monotonic() - self._noted >= _SECONDS:
            self._note()

    @property
    def rows(self) -> int:
        """Examples, or windows of documents, in all chunks."""
        return sum(self._rows)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return sum(starts[-1] for starts in self._starts.values())

    def finish(self, counts: Mapping[str, int]) -> None:
        """Leave the folder as `PreparedDataset` reads it, with the report of ``counts``."""
        for name in file_names(self.models):
            self._files[name].write(_END)
        for file in self._files.values():
            file.close()
        lengths = np.fromfile(self.folder / _LENGTHS, np.int32).reshape(-1, self.models)
        np.save(self.folder / "lengths.npy", lengths)
        for name in (_LENGTHS, _JOURNAL):
            (self.folder / name).unlink(missing_ok=True)
        streams = {
            name: Blocks(
                self._starts[name][-1] + len(_END), tuple(self._starts[name]), tuple(self._rows),
                tuple(self._crc32[name]),
            )
            for name in file_names(self.models)
        }  # fmt: skip
        write_report(self.folder / "report.json", dict(counts), [self.folder / "lengths.npy"], streams)

    def _append(self, name: str, message: bytes) -> None:
        self._files[name].write(message)
        self._starts[name].append(self._starts[name][-1] + len(message))
        self._crc32[name].append(zlib.crc32(message))

    def _note(self) -> None:
        self._noted = time.monotonic()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        state = {
            "chunks": self.chunks,
            "records": self.records,
            "counts": self.counts,
            "rows": self._rows,
            "starts": self._starts,
            "checksums": self._crc32,
        }
        with replacing(self.folder / _JOURNAL) as temporary:
            temporary.write_text(json.dumps(sealed(state), ensure_ascii=False) + "\n", encoding="utf-8")

    def _resume(self) -> None:
        state = read_object(self.folder / _JOURNAL, "")
        sizes = {name: starts[-1] for name, starts in state["starts"].items()}
        sizes[_LENGTHS] = sum(state["rows"]) * self.models * np.dtype(np.int32).itemsize
        for name, size in sizes.items():
            if (self.folder / name).stat().st_size < size:
                raise ValueError(f"{name} is shorter than the journal says")
        self.chunks, self.records = int(state["chunks"]), int(state["records"])
        self.counts = Counter(state["counts"])
        self._starts, self._crc32, self._rows = state["starts"], state["checksums"], state["rows"]
        self._open(sizes)
        _log.info("Going on with %s records that an earlier process has prepared.", f"{self.records:,}")

    def _open(self, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            file = self._files[name] = (self.folder / name).open("r+b" if size else "wb")
            file.truncate(size)
            file.seek(size)
