"""Prepared files on a bounded disk: which of them are there, who reads which, and where it went wrong."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dskd_lightning.files import read_if_there, write_object

__all__ = ["Place", "Portion", "Shelf", "order_of_files"]

Place: TypeAlias = tuple[int, int]
"""An epoch, and how many files of its order came before."""

_REMEDY = "delete the folder, which prepares the data anew"


def order_of_files(files: int, seed: int, epoch: int) -> list[int]:
    """Numbers of all files in the order in which an epoch reads them."""
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(files).tolist()
    return order


@dataclass(frozen=True)
class Portion:
    """Consecutive files of an epoch that are read together, their examples mixed.

    Args:
        epoch: whose order it is.
        start: the first of its files in that order.
        stop: the file behind the last one.
        files: of the whole epoch.
        folders: names of the prepared files.
    """

    epoch: int
    start: int
    stop: int
    files: int
    folders: tuple[str, ...]

    @property
    def place(self) -> Place:
        """Where it begins."""
        return self.epoch, self.start

    @property
    def next(self) -> Place:
        """Where the portion behind it begins, perhaps in the next epoch."""
        return (self.epoch, self.stop) if self.stop < self.files else (self.epoch + 1, 0)


class Shelf:
    """A folder of prepared files that the process which prepares and those which read agree about.

    They agree by small files, each of which is whole or not there, and so over any disk that they share.

    Args:
        root: the folder; prepared files are folders in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._portions, self._readers = root / "portions", root / "readers"
        self._failure = root / "failure.json"

    def clear(self) -> None:
        """Forget portions, readers and failures of an earlier run, not what it has prepared."""
        for folder in (self._portions, self._readers):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():  # the folder stays: other machines begin at the same time
                path.unlink(missing_ok=True)
        self._failure.unlink(missing_ok=True)

    def publish(self, portion: Portion) -> None:
        """Say that a portion is there to be read."""
        write_object(self._at(portion.place), asdict(portion))

    def withdraw(self, portion: Portion) -> None:
        """Say that a portion is no longer there, before its files go."""
        self._at(portion.place).unlink(missing_ok=True)

    def portion(self, place: Place) -> Portion | None:
        """What begins at a place, None until it is there."""
        return self._read(self._at(place))

    def portions(self) -> list[Portion]:
        """All that are there to be read."""
        found = [self._read(path) for path in self._portions.glob("*.json")]
        return [portion for portion in found if portion is not None]

    def say_reading(self, reader: int, place: Place | None) -> None:
        """Say where a reader has arrived; None before it has begun."""
        write_object(self._readers / f"{reader}.json", {"place": place})

    def slowest(self) -> Place | None:
        """Where the last of the readers is; None before all have begun."""
        paths = sorted(self._readers.glob("*.json"))
        places = [(read_if_there(path, _REMEDY) or {"place": None})["place"] for path in paths]
        return min((epoch, start) for epoch, start in places) if places and all(places) else None

    def fail(self, message: str) -> None:
        """Say why no more portions will come."""
        write_object(self._failure, {"message": message})

    def failure(self) -> str | None:
        """Why no more portions will come; None while all is well."""
        failure = read_if_there(self._failure, _REMEDY)
        return None if failure is None else str(failure["message"])

    def prepared(self) -> list[Path]:
        """Folders of files that are prepared, or were begun to be."""
        own = {self._portions, self._readers}
        return [path for path in self.root.iterdir() if path.is_dir() and path not in own]

    def _at(self, place: Place) -> Path:
        return self._portions / f"{place[0]}-{place[1]}.json"

    def _read(self, path: Path) -> Portion | None:
        values = read_if_there(path, _REMEDY)
        return None if values is None else Portion(**{**values, "folders": tuple(values["folders"])})
