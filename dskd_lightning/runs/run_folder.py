"""The folder of one run, as training, prediction and comparison share it.

::

    RUN/
      predictions/seed_10.jsonl ...   one `Prediction` a line; greedy.jsonl for greedy decoding
      metrics.json                    final numbers, flat: {"perplexity_per_byte": 1.9, ...}
      metrics.csv                     curves, as Lightning's CSVLogger writes them
      config.yaml                     the whole configuration
      environment.json                versions and hardware, see `environment.collect_environment`
      efficiency.json                 see `efficiency.Efficiency`
      teacher_efficiency.json         the same of the first teacher
      training.json                   see `callbacks.TrainingCost`
      representation.json             see `callbacks.RepresentationAnalysis`
      alignments/*.json               `AlignmentMap`s

Only ``predictions/`` is needed for a comparison; the rest is shown where it is there.
"""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dskd_lightning.errors import UserError
from dskd_lightning.runs.predictions import Prediction, read_predictions

__all__ = ["AlignmentMap", "Curves", "RunFolder"]

Curves = dict[str, list[tuple[float, float]]]
"""Metric name -> (step, value) points in order."""


@dataclass(frozen=True)
class AlignmentMap:
    """Attention or alignment weights of one response, for a heatmap.

    Args:
        title: what is shown.
        student: the student's tokens as text, one per row.
        teacher: the teacher's tokens as text, one per column.
        weights: rows of weights in [0, 1].
    """

    title: str
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.student) or any(
            len(row) != len(self.teacher) for row in self.weights
        ):
            raise UserError(
                f"alignment map {self.title!r}: weights must be {len(self.student)} rows "
                f"of {len(self.teacher)}."
            )


@dataclass(frozen=True)
class RunFolder:
    """What a run left behind.

    Args:
        path: the folder.
        name: how the run is called in tables and plots.
        predictions: by seed, None for greedy decoding; empty where there are none.
        metrics: final numbers.
        curves: numbers by step.
        config: text of the configuration, or None.
        environment: versions and hardware.
        efficiency: fields of `Efficiency`, or None.
        teacher_efficiency: the same of the teacher, where it was measured.
        alignments: maps to draw.
        representation: distances to the teacher and spectra of projectors, or None.
        training: what training has cost, or None.
    """

    path: Path
    name: str
    predictions: dict[int | None, list[Prediction]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    config: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    efficiency: dict[str, Any] | None = None
    alignments: tuple[AlignmentMap, ...] = ()
    representation: dict[str, Any] | None = None
    teacher_efficiency: dict[str, Any] | None = None
    training: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str], name: str | None = None) -> RunFolder:
        """Read a run folder; parts that are missing stay empty.

        Raises:
            UserError: the folder does not exist or a file in it is malformed.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(
                f"{path}: no such run folder; give the folder that holds predictions/ and metrics.json."
            )
        metrics = _read_json(path / "metrics.json") or {}
        config = path / "config.yaml"
        return cls(
            path=path,
            name=name or Path(os.path.abspath(path)).name,
            predictions=_read_all_predictions(path / "predictions"),
            metrics={key: float(value) for key, value in metrics.items() if isinstance(value, (int, float))},
            curves=_read_curves(path / "metrics.csv"),
            config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
            environment=_read_json(path / "environment.json") or {},
            efficiency=_read_json(path / "efficiency.json"),
            alignments=tuple(_read_alignment(file) for file in sorted(path.glob("alignments/*.json"))),
            teacher_efficiency=_read_json(path / "teacher_efficiency.json"),
            representation=_read_json(path / "representation.json"),
            training=_read_json(path / "training.json"),
        )


def _read_all_predictions(folder: Path) -> dict[int | None, list[Prediction]]:
    predictions: dict[int | None, list[Prediction]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        read = read_predictions(file)
        seeds = {prediction.seed for prediction in read}
        if len(seeds) > 1:
            raise UserError(
                f"{file}: mixes predictions of seeds {sorted(map(str, seeds))}; keep one file per seed."
            )
        seed = seeds.pop()
        if seed in predictions:
            raise UserError(f"{file}: seed {seed} is in another file of {folder} too; delete one of them.")
        predictions[seed] = read
    return predictions


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: malformed JSON ({error}); delete it or write it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object, not {type(value).__name__}.")
    return value


def _read_curves(path: Path) -> Curves:
    curves: Curves = {}
    if not path.is_file():
        return curves
    with path.open(encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream), 2):
            try:
                step = float(row.pop("step", None) or number - 2)
                points = {key: float(text) for key, text in row.items() if key and text and key != "epoch"}
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: not a number ({error}); expected a CSVLogger file."
                ) from error
            for key, value in points.items():
                if math.isfinite(value):
                    curves.setdefault(key, []).append((step, value))
    return curves


def _read_alignment(path: Path) -> AlignmentMap:
    values = _read_json(path) or {}
    try:
        rows = tuple(tuple(float(weight) for weight in row) for row in values["weights"])
        title = str(values.get("title", path.stem))
        return AlignmentMap(title, tuple(values["student"]), tuple(values["teacher"]), rows)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: an alignment map needs student, teacher and weights ({error!r})."
        ) from error
