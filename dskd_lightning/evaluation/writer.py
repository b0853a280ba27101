"""Predictions written one by one, kept through a kill, finished atomically."""

from __future__ import annotations

import contextlib
import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from dskd_lightning.errors import UserError
from dskd_lightning.files import write_atomic
from dskd_lightning.runs.lock import take_file
from dskd_lightning.runs.predictions import Prediction, check_complete
from dskd_lightning.runs.stored_predictions import StoredPredictions

__all__ = ["PredictionWriter", "count_answered"]

logger = logging.getLogger(__name__)

_BLOCK = 1 << 16


class PredictionWriter:
    """Appends predictions to ``FILE.partial-RANK`` and makes ``FILE`` of them at the end.

    Every append reaches the disk before it returns. Partial files of all ranks are read at the
    start, so that a run may be continued with another number of processes; put a barrier between
    constructing the writers and the first append. A partial file is held while it is written, since a
    process of a run that was killed may go on after it. The keys of ``done`` are the indices written so far;
    what was written lies on the disk alone.

    Args:
        path: the finished file.
        rank: this process among those that write to the same file.

    Raises:
        UserError: a partial file is damaged in the middle, or another process still writes it.
    """

    def __init__(self, path: str | os.PathLike[str], *, rank: int = 0) -> None:
        self.path = Path(path)
        self._partial = self.path.with_name(f"{self.path.name}.partial-{rank}")
        self._stream: BinaryIO | None = None
        self.done: dict[int, None] = {}
        for partial in _partials(self.path):
            with partial.open("rb") as looked_at:
                _hold(looked_at, partial, shared=True)
            self.done |= dict.fromkeys(prediction.index for _, prediction in _read_partial(partial))
        if self.done:
            logger.info("%s: continuing after %d predictions", self.path, len(self.done))

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Add predictions and wait until they are on the disk.

        Raises:
            UserError: one of them has been written before, or the disk is full.
        """
        for prediction in predictions:
            if prediction.index in self.done:
                raise UserError(
                    f"{self.path}: prompt {prediction.index} is answered twice; indices must be unique."
                )
            self.done[prediction.index] = None
        lines = "".join(prediction.to_json() + "\n" for prediction in predictions)
        try:
            stream = self._open()
            stream.write(lines.encode("utf-8", errors="replace"))
            stream.flush()
            os.fsync(stream.fileno())
        except OSError as error:
            raise UserError(
                f"{self._partial}: cannot be written ({error.strerror}); free space and run again."
            ) from error

    def close(self) -> None:
        """Close the partial file; what was appended stays."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def finish(self, expected: Sequence[int]) -> StoredPredictions:
        """Write the finished file from the partial files of all ranks, and delete those.

        Call it on one rank only, after a barrier.

        Raises:
            UserError: a prediction is missing or duplicated; the partial files are kept.
        """
        self.close()
        partials = _partials(self.path)
        indices, places = array("q"), _Places()
        for number, partial in enumerate(partials):
            for place, prediction in _read_partial(partial):
                indices.append(prediction.index)
                places.append(number, place)
        check_complete(indices, expected, str(self.path))
        order = np.argsort(indices, kind="stable")
        write_atomic(self.path, (line + "\n" for line in _merged(partials, places, order)))
        for partial in partials:
            partial.unlink()
        return StoredPredictions(self.path, expected)

    def _open(self) -> BinaryIO:
        if self._stream is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stream = self._partial.open("a+b")
            _hold(stream, self._partial)
            stream.truncate(_whole(stream))
            self._stream = stream
        return self._stream


def count_answered(path: Path) -> int:
    """Whole lines of a finished file, or of its partial files, which aren't read for what they hold."""
    files = [path] if path.exists() else _partials(path)
    return sum(_line_breaks(file) for file in files)


def _hold(stream: BinaryIO, path: Path, shared: bool = False) -> None:
    if not take_file(stream, shared):
        stream.close()
        raise UserError(
            f"{path}: another process still writes it: wait until it has ended, or end it, and run again."
        )


def _line_breaks(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(_BLOCK), b""))


def _partials(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.partial-*"))


def _whole(stream: BinaryIO) -> int:
    """Bytes up to the last line break, which is looked for from the end."""
    end = stream.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - _BLOCK)
        stream.seek(begin)
        found = stream.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


class _Places:
    """Lines of several files: which file, and where in it."""

    def __init__(self) -> None:
        self._files, self._places = array("i"), array("q")

    def append(self, file: int, place: int) -> None:
        self._files.append(file)
        self._places.append(place)

    def __getitem__(self, at: int) -> tuple[int, int]:
        return self._files[at], self._places[at]


def _merged(partials: Sequence[Path], places: _Places, order: Iterable[int]) -> Iterator[str]:
    """Lines of partial files in ``order``, one in memory at a time."""
    with contextlib.ExitStack() as opened:
        streams = [opened.enter_context(partial.open("rb")) for partial in partials]
        for at in order:
            file, place = places[at]
            streams[file].seek(place)
            where = f"{partials[file]}, the line at byte {place}"
            yield _parsed(streams[file].readline(), partials[file], where).to_json()


def _read_partial(path: Path) -> Iterator[tuple[int, Prediction]]:
    """Where each line begins and what it holds, one at a time."""
    place = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                logger.warning("%s: ignored a last line that was cut off; it is generated again", path)
                return
            yield place, _parsed(line, path, f"{path}:{number}")
            place += len(line)


def _parsed(line: bytes, path: Path, where: str) -> Prediction:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is damaged ({error}); delete that file to generate it again.") from error
    return Prediction.from_json(text, where, share=False)
