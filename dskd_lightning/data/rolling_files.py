"""The training files of one run, of which a bounded disk holds a few at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dskd_lightning.data.ahead import AheadJob, start_ahead
from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.loader import DistillationLoader
from dskd_lightning.data.portions import Place, Shelf
from dskd_lightning.data.preparation import announce, prepared_folder, remove_abandoned, unwritable
from dskd_lightning.data.prepared import PreparedDataset
from dskd_lightning.data.rendering import PreparationSettings
from dskd_lightning.data.rolling import RollingLoader
from dskd_lightning.data.sources import Source
from dskd_lightning.errors import UserError
from dskd_lightning.runs.lock import locked

__all__ = ["RollingFiles"]

_ROLLING = "rolling-"
"""How the folders of runs begin beside those of data that stay."""


class RollingFiles:
    """A folder of one run's in the cache, who prepares there, and the loader that reads.

    Args:
        cache_dir: holds the folder.
        run: what tells the run from others; the same when it is resumed.
        sources: the files.
        renderers: of the student and each teacher.
        settings: of the rendering.
        limit_gb: GiB on the disk.
        seed: of the order of the files.
        processes: that render.
    """

    def __init__(
        self,
        cache_dir: Path,
        run: str,
        sources: Sequence[Source],
        renderers: Sequence[ChatRenderer],
        settings: PreparationSettings,
        limit_gb: float,
        seed: int,
        processes: int,
    ) -> None:
        self._order = json.dumps([[source.name for source in sources], limit_gb, seed])
        models = [[renderer.fingerprint, renderer.system] for renderer in renderers]
        told = json.dumps([run, models, asdict(settings), self._order], sort_keys=True)
        root = cache_dir / f"{_ROLLING}{_hash(told)[:32]}"
        self.job = AheadJob(root, sources, renderers, settings, int(limit_gb * 2**30), seed, processes)
        self.shelf = Shelf(root)
        self._lock = contextlib.ExitStack()
        self._loader: RollingLoader | None = None

    def begin(self, alone: bool = True) -> None:
        """Begin a run, perhaps one that goes on; once on each disk, before anybody reads.

        Args:
            alone: keep other runs out of the folder, which one of several ranks does.

        Raises:
            UserError: another run is there, or the folder can't be written.
        """
        root = self.job.root
        held = (
            f"data.disk_limit_gb: another run prepares the same data in '{root}', as it has the same output "
            "folder: give one of them another (`--output`, default_root_dir of the Trainer), or another "
            "data.cache_dir."
        )
        self.stop(keep_lock=not alone)  # before what they agree about is cleared
        try:
            if alone:
                self._lock.enter_context(locked(root / ".run.lock", held))
            remove_abandoned(root.parent, _ROLLING, but=root)
            self.shelf.clear()
        except OSError as error:
            raise unwritable(root, error) from error

    def first(self) -> PreparedDataset:
        """The first file that has examples, which stays; for whoever looks at a few.

        Raises:
            UserError: as `prepare`, and where it takes too much of the disk.
        """
        job = self.job
        for source in job.sources:
            folder, made = prepared_folder(
                [source], job.renderers, job.settings, job.root, job.processes, job.part
            )
            dataset = PreparedDataset(folder)
            if made:
                announce(dataset, [source])
            if len(dataset):
                self.job = replace(job, first=folder.name)
                return dataset
        raise UserError("No example is left of any training file: check the files and the lengths.")

    def loader(
        self,
        make: Callable[[PreparedDataset], DistillationLoader],
        rank: int = 0,
        leads: bool = True,
        batches: int | None = None,
        processed: Callable[[], int] | None = None,
    ) -> RollingLoader:
        """What reads from now on; an earlier loader's files are prepared no more.

        Args:
            make: the loader of a portion.
            rank: as of `RollingLoader`, as are ``batches`` and ``processed``.
            leads: whether this process has the files prepared, one of each machine.
        """
        self.stop(keep_lock=True)

        def start(place: Place) -> subprocess.Popen[bytes]:
            process = start_ahead(replace(self.job, start=place))
            weakref.finalize(self, process.kill)
            return process

        key = _hash(self._order)[:16]
        self._loader = RollingLoader(
            self.shelf, start if leads else None, make, key, rank, batches, processed
        )
        return self._loader

    def stop(self, keep_lock: bool = False) -> None:
        """Prepare no more; what is there stays."""
        if self._loader is not None:
            self._loader.stop()
        if not keep_lock:
            self._lock.close()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.job.root, ignore_errors=True)

    def remove_in_the_end(self) -> None:
        """Delete the folder when this object goes."""
        weakref.finalize(self, shutil.rmtree, self.job.root, ignore_errors=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
