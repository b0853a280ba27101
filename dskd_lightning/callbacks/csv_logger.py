"""A CSV logger whose file survives a resumed run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["ResumableCSVLogger"]


class ResumableCSVLogger(CSVLogger):
    """Writes ``FOLDER/metrics.csv``; with ``resume`` it goes on after the rows already there.

    Args:
        folder: the run folder.
        resume: keep the rows of an earlier run instead of starting over.
        retrain: of those, drop the rows from the first step on that is logged now: steps that
            ran after the checkpoint and run again.
        flush_every: logging steps between writes.
    """

    def __init__(
        self, folder: str | Path, resume: bool = False, retrain: bool = False, flush_every: int = 10
    ) -> None:
        self._path = Path(folder) / "metrics.csv"
        self._earlier: list[dict[str, str]] = []
        self._retrain = retrain
        if resume and self._path.is_file():
            with self._path.open(encoding="utf-8", newline="") as stream:
                self._earlier = [{k: v for k, v in row.items() if v} for row in csv.DictReader(stream)]
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=flush_every)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self._retrain and step is not None:
            self._earlier = [row for row in self._earlier if float(row.get("step", 0)) < step]
            self._retrain = False
        super().log_metrics(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        if self._earlier:
            experiment = self.experiment
            experiment.metrics = [*self._earlier, *experiment.metrics]
            self._earlier = []
        super().save()
