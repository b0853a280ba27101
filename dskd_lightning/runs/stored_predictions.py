"""Predictions that stay in their file: what lies in memory doesn't grow with their texts."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np

from dskd_lightning.errors import UserError
from dskd_lightning.runs.predictions import Prediction, check_complete

__all__ = ["StoredPredictions"]


class StoredPredictions(Sequence[Prediction]):
    """The predictions of a finished file by ascending index, each read when it is asked for.

    Every line is checked at first, and again whenever it is read; the place of each line is all that lies
    in memory beside ``indices``. A slice is a list. Equal to any sequence of equal predictions.

    Args:
        path: the file, which must stay as it is.
        expected: indices that must all be there; None checks for duplicates only.

    Raises:
        UserError: the file is unreadable, a line malformed, a prediction missing or duplicated.
    """

    def __init__(self, path: str | os.PathLike[str], expected: Iterable[int] | None = None) -> None:
        self.path = Path(path)
        indices, places, place = array("q"), array("q"), 0
        try:
            with self.path.open("rb") as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        indices.append(_parsed(line, f"{self.path}:{number}").index)
                        places.append(place)
                    place += len(line)
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(self.path, error) from error
        if not places:
            raise UserError(f"{self.path}: holds no predictions; generate them again with `dskd predict`.")
        check_complete(indices, expected, str(self.path))
        order = np.argsort(indices, kind="stable")
        self.indices, self._places = np.array(indices)[order], np.array(places)[order]

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Prediction]:
        return self._read(range(len(self)))

    @overload
    def __getitem__(self, at: int) -> Prediction: ...

    @overload
    def __getitem__(self, at: slice) -> list[Prediction]: ...

    def __getitem__(self, at: int | slice) -> Prediction | list[Prediction]:
        wanted = range(len(self))[at]
        return list(self._read(wanted)) if isinstance(wanted, range) else next(self._read([wanted]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _read(self, wanted: Sequence[int]) -> Iterator[Prediction]:
        try:
            with self.path.open("rb") as stream:
                for at in wanted:
                    yield self._line(stream, int(self._places[at]))
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(self.path, error) from error

    def _line(self, stream: BinaryIO, place: int) -> Prediction:
        stream.seek(place)
        return _parsed(stream.readline(), f"{self.path}, the line at byte {place}")


def _parsed(line: bytes, where: str) -> Prediction:
    return Prediction.from_json(line.decode("utf-8"), where, share=False)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read as predictions ({error}).")
