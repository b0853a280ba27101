"""A CSV logger whose file survives a resumed run."""

from __future__ import annotations

import csv
import io
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from dskd_lightning.files import write_atomic
from dskd_lightning.runs.metrics_file import checksum_file, read_rows, write_checksum

__all__ = ["ResumableCSVLogger"]


class ResumableCSVLogger(CSVLogger):
    """Writes ``FOLDER/metrics.csv``; with ``resume`` it goes on after the rows already there.

    What the file holds stays until the first rows of this run are saved, and is replaced whole:
    neither a kill nor a full disk costs a row that has been written.

    Args:
        folder: the run folder.
        resume: keep the rows of an earlier run instead of starting over.
        retrain: of those, drop the rows from the first step on that is logged now: steps that
            ran after the checkpoint and run again.
        flush_every: logging steps between writes.

    Raises:
        UserError: the file that is to be kept is damaged.
    """

    def __init__(
        self, folder: str | Path, resume: bool = False, retrain: bool = False, flush_every: int = 10
    ) -> None:
        self._path, self._resume, self._retrain = Path(folder) / "metrics.csv", resume, retrain
        self._earlier = self._read()  # now, so that a damaged file is told before anything else is done
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=flush_every)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """Where Lightning puts rows."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._earlier = self._read()  # the run before may have ended meanwhile
            self._experiment = _Rows(self.log_dir, self._earlier)
        return cast("_Rows", self._experiment)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        _ = self.experiment
        if self._retrain and step is not None:
            self._earlier[:] = [row for row in self._earlier if float(row.get("step", 0)) < step]
            self._retrain = False
        super().log_metrics(metrics, step)

    def _read(self) -> list[dict[str, str]]:
        return read_rows(self._path) if self._resume and self._path.is_file() else []


class _Rows(ExperimentWriter):
    """Lightning's writer deletes the file at the start and rewrites it in place; this one does neither.

    Args:
        log_dir: folder of the file.
        earlier: rows to keep; read at the first save.
    """

    def __init__(self, log_dir: str, earlier: Sequence[dict[str, str]]) -> None:
        super().__init__(log_dir=log_dir)
        self._earlier: Sequence[dict[str, str]] | None = earlier
        self._size = self._crc32 = 0

    def _check_log_dir_exists(self) -> None:
        pass

    def save(self) -> None:
        save_hparams_to_yaml(os.path.join(self.log_dir, self.NAME_HPARAMS_FILE), self.hparams)
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        known = {key for row in self._earlier or () for key in row} | set(self.metrics_keys)
        keys = sorted(known.union(*self.metrics))
        if self._earlier is None and keys == self.metrics_keys and path.is_file():
            data = _csv(keys, self.metrics)
            _append(path, data)
        else:
            earlier = self._earlier
            if earlier is None:
                earlier = read_rows(path) if path.is_file() else []
            header = dict(zip(keys, keys, strict=True))
            data = _csv(keys, [header, *earlier, *self.metrics])
            checksum_file(path).unlink(missing_ok=True)
            write_atomic(path, data)
            self._size = self._crc32 = 0
        self.metrics, self.metrics_keys, self._earlier = [], keys, None
        self._size, self._crc32 = self._size + len(data), zlib.crc32(data, self._crc32)
        write_checksum(path, self._size, self._crc32)


def _csv(keys: Sequence[str], rows: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, keys).writerows(rows)
    return text.getvalue().encode("utf-8", errors="replace")


def _append(path: Path, data: bytes) -> None:
    """Add lines and wait until they are on the disk; where it is full, what was added is taken away again."""
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise
