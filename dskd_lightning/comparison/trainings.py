"""Several training runs of one method, which differ in their seeds, compared as one."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dskd_lightning.errors import UserError
from dskd_lightning.runs.run_folder import RunFolder

__all__ = ["named_folders", "open_trainings", "pooled"]


def named_folders(run: str) -> tuple[str | None, list[str]]:
    """The name that ``[NAME=]FOLDER[,FOLDER...]`` gives, or None, and the folders.

    Raises:
        UserError: a folder is empty or named twice.
    """
    if Path(run).is_dir():
        return None, [run]
    name, separator, place = run.partition("=")
    if not separator:
        name, place = "", run
    folders = [place] if Path(place).is_dir() else place.split(",")
    if "" in folders or len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise UserError(f"{run!r}: name each training run once, as [NAME=]FOLDER,FOLDER.")
    return name or None, folders


def open_trainings(run: str) -> list[RunFolder]:
    """The runs that ``[NAME=]FOLDER[,FOLDER...]`` names, each under that name or one after the first folder.

    Raises:
        UserError: as `named_folders` and `RunFolder.read`.
    """
    name, folders = named_folders(run)
    runs = [RunFolder.read(folder, name) for folder in folders]
    if name is None and len(runs) > 1:
        name = f"{runs[0].name} and {len(runs) - 1} more"
        runs = [replace(run, name=name) for run in runs]
    return runs


def pooled(runs: Sequence[RunFolder]) -> RunFolder:
    """One run with the responses of all, and the means of the final numbers that all have.

    What belongs to one model (curves, maps, samples, the cost of training) is left out; configuration,
    environment and efficiency are those of the first.

    Raises:
        UserError: one of several runs has no predictions.
    """
    first, *others = runs
    if not others:
        return first
    for run in runs:
        run.check_predicted()
    numbers = set(first.metrics).intersection(*(run.metrics for run in others))
    return replace(
        first,
        predictions={
            (number, seed): responses
            for number, run in enumerate(runs)
            for (seed, responses) in run.trainings()[0].items()
        },
        metrics={name: statistics.fmean(run.metrics[name] for run in runs) for name in sorted(numbers)},
        curves={},
        alignments=(),
        samples=(),
        representation=None,
        training=None,
        scores={},
    )
