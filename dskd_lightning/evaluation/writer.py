"""Predictions written one by one, kept through a kill, finished atomically."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from dskd_lightning.errors import UserError
from dskd_lightning.files import write_atomic
from dskd_lightning.runs.predictions import Prediction, check_complete

__all__ = ["PredictionWriter", "count_answered"]

logger = logging.getLogger(__name__)

_BLOCK = 1 << 16


class PredictionWriter:
    """Appends predictions to ``FILE.partial-RANK`` and makes ``FILE`` of them at the end.

    Every append reaches the disk before it returns. Partial files of all ranks are read at the
    start, so that a run may be continued with another number of processes; put a barrier between
    constructing the writers and the first append.

    Args:
        path: the finished file.
        rank: this process among those that write to the same file.

    Raises:
        UserError: a partial file is damaged in the middle.
    """

    def __init__(self, path: str | os.PathLike[str], *, rank: int = 0) -> None:
        self.path = Path(path)
        self._partial = self.path.with_name(f"{self.path.name}.partial-{rank}")
        self._stream: BinaryIO | None = None
        self.done = {prediction.index: prediction for prediction in self._recover()}
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
            self.done[prediction.index] = prediction
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

    def finish(self, expected: Sequence[int]) -> list[Prediction]:
        """Write the finished file from the partial files of all ranks, and delete those.

        Call it on one rank only, after a barrier.

        Raises:
            UserError: a prediction is missing or duplicated; the partial files are kept.
        """
        self.close()
        predictions = sorted(self._recover(), key=lambda prediction: prediction.index)
        check_complete(predictions, expected, str(self.path))
        write_atomic(self.path, "".join(prediction.to_json() + "\n" for prediction in predictions))
        for partial in _partials(self.path):
            partial.unlink()
        return predictions

    def _open(self) -> BinaryIO:
        if self._stream is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stream = self._partial.open("a+b")
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
            self._stream = stream
        return self._stream

    def _recover(self) -> list[Prediction]:
        return [prediction for partial in _partials(self.path) for prediction in _read_partial(partial)]


def count_answered(path: Path) -> int:
    """Whole lines of a finished file, or of its partial files, which aren't read for what they hold."""
    files = [path] if path.exists() else _partials(path)
    return sum(_line_breaks(file) for file in files)


def _line_breaks(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(_BLOCK), b""))


def _partials(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.partial-*"))


def _read_partial(path: Path) -> list[Prediction]:
    whole, _, cut = path.read_bytes().rpartition(b"\n")
    if cut:
        logger.warning("%s: ignored a last line that was cut off; it is generated again", path)
    try:
        lines = whole.decode("utf-8").split("\n") if whole else []
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is damaged ({error}); delete that file to generate it again.") from error
    return [Prediction.from_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
