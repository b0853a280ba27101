"""Batches of one rank from files that come and go on a bounded disk, resumable anywhere."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dskd_lightning.data.checked_files import read_report
from dskd_lightning.data.loader import DistillationLoader
from dskd_lightning.data.portions import Place, Portion, Shelf
from dskd_lightning.data.prepared import PreparedDataset
from dskd_lightning.errors import UserError
from dskd_lightning.structures import DistillationBatch

__all__ = ["RollingLoader"]

_LOOK = 0.05  # seconds between two looks whether a portion is there
_KEPT = 16
"""Portions that are remembered: a step of accumulated batches that is taken again after a kill may begin
in one that was read."""


@dataclass(frozen=True)
class _Opened:
    """A portion that was begun: its place, all batches before it, and the key of its loader where known."""

    place: Place
    before: int
    key: str | None


class RollingLoader:
    """As `DistillationLoader`, one `Portion` after the other, without an end.

    How many batches the files hold nobody knows before all were read; so an epoch of the Trainer is as long
    as it says, and the next one goes on where it ended, perhaps in the middle of the files.

    Args:
        shelf: where portions appear.
        start: makes them appear from a place on; None where another process of this machine does.
        make: the loader of a portion.
        key: what the order of the files follows from.
        rank: this process's.
        batches: of an epoch of the Trainer, None without one.
        processed: number of all batches that training has finished. Without it, a batch counts as finished
            when it was handed out.

    Attributes:
        counts: what the files that were read so far hold, as `PreparedDataset.report`.
    """

    def __init__(
        self,
        shelf: Shelf,
        start: Callable[[Place], subprocess.Popen[bytes]] | None,
        make: Callable[[PreparedDataset], DistillationLoader],
        key: str,
        rank: int = 0,
        batches: int | None = None,
        processed: Callable[[], int] | None = None,
    ) -> None:
        self.shelf, self.rank, self._key = shelf, rank, key
        self._start, self._make = start, make
        self._batches, self._processed = batches, processed
        self.counts: Counter[str] = Counter()
        self._waited = 0.0
        self._seen: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._opened = [_Opened((0, 0), 0, None)]
        self._handed = 0
        self._offset = 0 if processed is None else processed()  # of an earlier fit
        self._loader: DistillationLoader | None = None

    @property
    def waited(self) -> float:
        """Seconds that whoever iterates has waited for batches so far."""
        return self._waited + (0.0 if self._loader is None else self._loader.waited)

    @property
    def counts_finished(self) -> bool:
        """Whether `state_dict` tells what training has finished, however far it was read ahead."""
        return self._processed is not None

    def __len__(self) -> int:
        if self._batches is None:
            raise TypeError("without a Trainer, training data with a limit on the disk have no end")
        return self._batches

    def __iter__(self) -> Iterator[DistillationBatch]:
        """All batches behind those that are finished."""
        begun = self._reached()
        position = self._done() - begun.before
        self._opened = self._opened[: self._opened.index(begun) + 1]
        place, before, key = begun.place, begun.before, begun.key
        since: int | None = None  # the epoch of the files without an example so far
        while True:
            portion = self._arrive(place)
            dataset = PreparedDataset(*(self.shelf.root / name for name in portion.folders))
            if len(dataset):
                loader = self._make(dataset)
                loader.set_epoch(portion.epoch)
                state = {"epoch": portion.epoch, "position": position, "key": key or loader.key}
                loader.load_state_dict(state)
                if position < len(loader):
                    self._open(_Opened(place, before, loader.key))
                    self._handed = before + position
                    yield from self._counted(loader)
                before += len(loader)
                since = None
            elif since is None and portion.start == 0:
                since = portion.epoch
            place, position, key = portion.next, 0, None
            if since is not None and place[0] > since:
                raise UserError("No example is left of any training file: check the files and the lengths.")

    def _counted(self, loader: DistillationLoader) -> Iterator[DistillationBatch]:
        self._loader = loader
        try:
            for batch in loader:
                self._handed += 1
                yield batch
        finally:  # also where an epoch of the Trainer ends before the portion
            self._waited += loader.waited
            self._loader = None

    def _open(self, opened: _Opened) -> None:
        if self._opened[-1].place == opened.place:  # where reading began
            self._opened.pop()
        self._opened = [*self._opened[1 - _KEPT :], opened]

    def _done(self) -> int:
        return self._handed if self._processed is None else self._processed() - self._offset

    def _reached(self) -> _Opened:
        """The portion in which the finished batches end."""
        done = self._done()
        return next((one for one in reversed(self._opened) if one.before <= done), self._opened[0])

    def _arrive(self, place: Place) -> Portion:
        """The portion at ``place``, when it is there."""
        self.shelf.say_reading(self.rank, place)
        if self._start is not None and self._process is None:
            self._process = self._start(place)
        begin = time.perf_counter()
        while (portion := self.shelf.portion(place)) is None:
            ended = self._process is not None and self._process.poll() is not None
            if (message := self.shelf.failure()) is not None:
                raise UserError(message)
            if ended:
                raise UserError(
                    "The process that prepares data ahead of training has ended without a reason that it "
                    "could write down, most often for want of memory or room on the disk: set a smaller "
                    "data.num_proc or free space, and go on with `--ckpt_path last`."
                )
            time.sleep(_LOOK)
        self._waited += time.perf_counter() - begin
        for name in set(portion.folders) - self._seen:
            self.counts.update(read_report(self.shelf.root / name / "report.json")[0])
            self._seen.add(name)
        return portion

    def stop(self) -> None:
        """End the process that prepares."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def state_dict(self) -> dict[str, Any]:
        """The portions that were begun and the number of finished batches, in plain types."""
        return {
            "opened": [[list(one.place), one.before, one.key] for one in self._opened],
            "done": self._done(),
            "offset": self._offset,
            "key": self._key,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the saved position.

        Raises:
            UserError: the files, their order or the limit differ; those of a portion, when it is read.
        """
        if state["key"] != self._key:
            raise UserError(
                "The checkpoint was saved with other training files, seed or data.disk_limit_gb, so its "
                "place in the epoch is meaningless: restore those, or start from its weights alone with "
                "`--model.weights_from`."
            )
        self._opened = [
            _Opened((int(epoch), int(file)), int(before), key)
            for (epoch, file), before, key in state["opened"]
        ]
        self._handed, self._offset = int(state["done"]), int(state["offset"])
