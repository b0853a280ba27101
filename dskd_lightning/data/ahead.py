"""A process that prepares files ahead of training and takes those away that were read, on a bounded disk."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.portions import Place, Portion, Shelf, order_of_files
from dskd_lightning.data.preparation import UNFINISHED, announce, bytes_of, cache_key, prepared_folder
from dskd_lightning.data.prepared import PreparedDataset
from dskd_lightning.data.rendering import PreparationSettings
from dskd_lightning.data.sources import Source
from dskd_lightning.errors import UserError
from dskd_lightning.runs.console import configure_output
from dskd_lightning.runs.lock import only_one

__all__ = ["PARTS", "AheadJob", "Preparer", "start_ahead"]

_log = logging.getLogger(__name__)
PARTS = 4
"""Parts of the disk: the first file, what is read, what comes next, and the file that is being prepared."""
_AHEAD = 2
"""Portions that are there at most: the one that is read, and the next."""
_LOOK = 0.1  # seconds between two looks at where the readers are
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from dskd_lightning.data.ahead import main; main()"
)


@dataclass(frozen=True)
class AheadJob:
    """What is prepared, and in which order.

    Args:
        root: folder of the `Shelf`.
        sources: all files.
        renderers: of the student and each teacher.
        settings: of the rendering.
        limit: most bytes on the disk.
        seed: of the order of the files.
        processes: that render.
        start: where reading begins.
        first: name of the prepared file that stays, None where nobody has looked at one.
    """

    root: Path
    sources: Sequence[Source]
    renderers: Sequence[ChatRenderer]
    settings: PreparationSettings
    limit: int
    seed: int
    processes: int
    start: Place = (0, 0)
    first: str | None = None

    @property
    def part(self) -> int:
        """Most bytes of a portion, and of a file."""
        return self.limit // PARTS


class Preparer:
    """Keeps the portion that is read and the next one on the disk.

    Portions follow from the job alone: files are added in the epoch's order while their sizes allow. So
    each is the same wherever reading begins, if it begins where a portion did.
    """

    def __init__(self, job: AheadJob) -> None:
        self.job, self.shelf = job, Shelf(job.root)
        self._found = self._left_by_others()
        self._last = job.first  # that was prepared
        self._told = {job.first}

    def run(self) -> None:
        """Prepare for as long as somebody reads.

        Raises:
            UserError: as `prepare`, and where a file takes too much of the disk.
        """
        place = self.job.start
        while True:
            place = self._collect(place)

    def _collect(self, place: Place) -> Place:
        """Publish the portion at ``place``; returns where to go on, which may be where the readers went."""
        job, (epoch, start) = self.job, place
        order = order_of_files(len(job.sources), job.seed, epoch)
        names: list[str] = []
        size, stop = 0, len(order)
        for position in range(start, len(order)):
            if (wanted := self._wait(names)) != place:
                return wanted
            name, more = self._prepare(order[position])
            if names and size + more > job.part:
                stop = position
                break
            names.append(name)
            size += more
        portion = Portion(epoch, start, stop, len(order), tuple(names))
        self.shelf.publish(portion)
        return portion.next

    def _wait(self, names: Sequence[str]) -> Place:
        """Until there is room for another file; takes away what nobody reads any more.

        Returns:
            The first place that isn't there yet on the way of the slowest reader.
        """
        while True:
            place = self.shelf.slowest() or self.job.start
            kept: list[Portion] = []
            while (portion := self.shelf.portion(place)) is not None:
                kept.append(portion)
                place = portion.next
            self._take_away(kept, {*names, self._last, self.job.first})
            if len(kept) < _AHEAD:
                return place
            os.utime(self.job.root)  # not abandoned
            time.sleep(_LOOK)

    def _take_away(self, kept: Sequence[Portion], names: set[str | None]) -> None:
        for portion in self.shelf.portions():
            if portion not in kept:
                self.shelf.withdraw(portion)
        names |= {name for portion in kept for name in portion.folders} | self._found
        for path in self.shelf.prepared():
            if path.name not in names:
                _remove(path)

    def _prepare(self, index: int) -> tuple[str, int]:
        """Name and bytes of a prepared file."""
        job = self.job
        source = [job.sources[index]]
        folder, made = prepared_folder(source, job.renderers, job.settings, job.root, job.processes, job.part)
        if made and folder.name not in self._told:  # once, not in each epoch
            announce(PreparedDataset(folder), source)
            self._told.add(folder.name)
        self._found.discard(folder.name)
        self._last = folder.name
        return folder.name, bytes_of(folder)

    def _left_by_others(self) -> set[str]:
        """What a run that ended has left of the files that come first, with the one that it had begun."""
        job, (epoch, start) = self.job, self.job.start
        there = {path.name: path for path in self.shelf.prepared()}
        names: set[str] = set()
        size = 0
        for index in order_of_files(len(job.sources), job.seed, epoch)[start:] if there else []:
            name = cache_key([job.sources[index]], job.renderers, job.settings)
            if name not in there:
                names.add(f"{UNFINISHED}{name}")
                break
            size += bytes_of(there[name])
            if size > (PARTS - 1) * job.part:
                break
            names.add(name)
        return names


def _remove(path: Path) -> None:
    """Delete a prepared file; a kill in between leaves nothing that looks like one."""
    with contextlib.suppress(OSError):
        if not path.name.startswith(UNFINISHED):
            path = path.rename(path.with_name(f"{UNFINISHED}gone-{path.name}"))
        shutil.rmtree(path)


def start_ahead(job: AheadJob) -> subprocess.Popen[bytes]:
    """Start the process; it ends when its standard input does, and so with this one."""
    content = pickle.dumps(job)
    # Not by `multiprocessing`, which would run the main script again, or fork beside a GPU.
    process = subprocess.Popen(
        [sys.executable, "-c", _START, json.dumps(sys.path)],
        stdin=subprocess.PIPE,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,  # what a terminal or a scheduler sends to this one's group isn't for it
    )
    # It reads when it has imported what it needs, and may have ended before.
    threading.Thread(target=_hand_over, args=(content, process), daemon=True).start()
    return process


def _hand_over(content: bytes, process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError, ValueError):
        assert process.stdin is not None
        process.stdin.write(content)
        process.stdin.flush()


def main() -> None:
    """In the process."""
    told_to_end = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: told_to_end.set())  # it ends with the one that reads
    job: AheadJob = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_input, daemon=True).start()
    configure_output()
    if hasattr(os, "nice"):
        os.nice(10)
    try:
        with only_one(job.root / ".ahead.lock", "prepares data ahead of training") as alone:
            if not alone:
                _log.warning("'%s' can't be locked: no other machine may prepare data there.", job.root)
            Preparer(job).run()
    except Exception as error:
        if told_to_end.is_set():  # so were those that it had started
            threading.Event().wait()
        message = str(error)
        if not isinstance(error, UserError):
            traceback.print_exc()
            message = f"The process that prepares data ahead of training failed: {error!r}."
        try:
            Shelf(job.root).fail(message)
        except UserError:  # a full disk
            _log.error("%s", message)
    sys.stderr.flush()
    os._exit(1)


def _end_with_input() -> None:
    # Not by `sys.stdin`, whose lock processes that are forked meanwhile would wait for.
    while os.read(0, 1):
        pass
    os._exit(0)
