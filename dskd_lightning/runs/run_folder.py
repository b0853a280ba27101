"""The folder of one run, as training, prediction and comparison share it.

::

    RUN/
      predictions/seed_10.jsonl ...   one `Prediction` a line; greedy.jsonl for greedy decoding
      metrics.json                    final numbers of the test: {"perplexity_per_byte": 1.9, ...}
      predict.json                    likewise of the responses that ``dskd predict`` made
      metrics.csv                     curves, as Lightning's CSVLogger writes them
      config.yaml                     the whole configuration
      environment.json                versions and hardware, see `environment.collect_environment`
      efficiency.json                 see `efficiency.Efficiency`
      teacher_efficiency.json         the same of the first teacher
      training.json                   see `callbacks.TrainingCost`
      representation.json             see `callbacks.RepresentationAnalysis`
      alignments/*.json               `AlignmentMap`s
      samples.json                    see `callbacks.SampleFidelity`

Under ``model`` results name the checkpoint, step and configuration they are of, see `identity`.
Only ``predictions/`` is needed for a comparison; the rest is shown where it is there.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dskd_lightning.errors import UserError
from dskd_lightning.files import read_if_there
from dskd_lightning.runs.heartbeat import Heartbeat
from dskd_lightning.runs.identity import MODEL_KEY
from dskd_lightning.runs.metrics_file import read_rows
from dskd_lightning.runs.predictions import Prediction, read_predictions
from dskd_lightning.runs.samples import SampledResponse, read_samples

__all__ = ["TEACHER", "AlignmentMap", "Curves", "Draw", "RunFolder"]

TEACHER = "teacher"
"""What stands for a run or a model where the teacher is meant, and the name of its folder."""

_REMEDY = "delete it or write it again"
_LARGEST = 1e308
_TEXTS = ("device", "energy_sources", MODEL_KEY)

Draw = int | None | tuple[int, int | None]
"""A sampling: its seed, None for greedy decoding; where several training runs are pooled, which of them and
its seed."""

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
        predictions: by sampling; empty where there are none.
        metrics: final numbers.
        curves: numbers by step.
        config: text of the configuration, or None.
        environment: versions and hardware.
        efficiency: fields of `Efficiency`, or None.
        teacher_efficiency: the same of the teacher, where it was measured.
        alignments: maps to draw.
        samples: what the student wrote by itself, with its teacher's opinion.
        representation: distances to the teacher and spectra of projectors, or None.
        training: what training has cost, or None.
        scores: what has been computed of the predictions, by the name of the metric.
    """

    path: Path
    name: str
    predictions: dict[Draw, list[Prediction]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    config: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    efficiency: dict[str, Any] | None = None
    alignments: tuple[AlignmentMap, ...] = ()
    samples: tuple[SampledResponse, ...] = ()
    representation: dict[str, Any] | None = None
    teacher_efficiency: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    scores: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def trainings(self) -> list[dict[int | None, list[Prediction]]]:
        """The predictions by seed, of each training run that is pooled here."""
        found: dict[int, dict[int | None, list[Prediction]]] = {}
        for draw, predictions in self.predictions.items():
            number, seed = draw if isinstance(draw, tuple) else (0, draw)
            found.setdefault(number, {})[seed] = predictions
        return list(found.values()) or [{}]

    def check_predicted(self) -> None:
        """Raise `UserError` where there are no predictions."""
        if not self.predictions:
            raise UserError(f"{self.path}: has no predictions/*.jsonl; make them with `dskd predict`.")

    def mixtures(self) -> list[str]:
        """What of the results is of different models, one sentence each."""
        files = ("metrics.json", "efficiency.json", "representation.json", "samples.json")
        models = {name: (_read_json(self.path / name) or {}).get(MODEL_KEY) for name in files}
        known = {name: model for name, model in models.items() if isinstance(model, dict)}
        shown = {name: _shown(model) for name, model in known.items()}
        found = [
            f"{self.path}: {other} is of {shown[other]}, {first} of {shown[first]}: test again"
            for first, other in itertools.pairwise(known)
            if any(known[first].get(key) != known[other].get(key) for key in ("digest", "step"))
        ]
        weights = known.get("metrics.json", {}).get("weights")
        made_by = (_read_json(self.path / "predictions" / "settings.json") or {}).get("model", weights)
        if weights is not None and made_by != weights:
            found.append(f"{self.path}: predictions are of another model than metrics.json: test again")
        return found

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
            metrics=_numbers(metrics, path / "metrics.json"),
            curves=_read_curves(path / "metrics.csv"),
            config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
            environment=_read_json(path / "environment.json") or {},
            efficiency=_read_costs(path / "efficiency.json"),
            alignments=tuple(filter(None, map(_read_alignment, sorted(path.glob("alignments/*.json"))))),
            samples=read_samples(path / "samples.json"),
            teacher_efficiency=_read_costs(path / "teacher_efficiency.json"),
            representation=_read_representation(path / "representation.json"),
            training=_read_costs(path / "training.json"),
        )


def _read_all_predictions(folder: Path) -> dict[Draw, list[Prediction]]:
    predictions: dict[Draw, list[Prediction]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        with Heartbeat(partial("reading {}".format, file), seconds=10):
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


def _shown(model: dict[str, Any]) -> str:
    return f"{model.get('checkpoint') or 'no checkpoint'} at step {model.get('step')} ({model.get('digest')})"


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_if_there(path, _REMEDY)


def _read_costs(path: Path) -> dict[str, Any] | None:
    """Costs by name: numbers, but for a few texts and what couldn't be measured."""
    values = _read_json(path)
    if values is not None:
        measured = {k: v for k, v in values.items() if v is not None and k not in _TEXTS}
        if len(_numbers(measured, path)) < len(measured):
            raise _damaged(path, "a cost is no number")
    return values


def _read_representation(path: Path) -> dict[str, Any] | None:
    """Numbers by name for each stage, and singular values of each projector."""
    values = _read_json(path)
    for stage in ("before", "after"):
        found = (values or {}).get(stage) or {}
        if not isinstance(found, dict) or len(_numbers(found, path)) < len(found):
            raise _damaged(path, f"{stage!r} must hold numbers by name")
    spectra = (values or {}).get("projectors") or {}
    if not isinstance(spectra, dict):
        raise _damaged(path, "'projectors' must be an object")
    for name, projector in spectra.items():
        spectrum = projector.get("singular_values", []) if isinstance(projector, dict) else None
        if not isinstance(spectrum, list) or not all(_is_number(value) for value in spectrum):
            raise _damaged(path, f"projector {name!r} must hold a list of singular values")
    return values


def _numbers(values: dict[str, Any], path: Path) -> dict[str, float]:
    """Those values that are numbers."""
    try:
        return {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
    except OverflowError as error:
        raise _damaged(path, "a number is too large") from error


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < _LARGEST)


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: is damaged ({reason}); {_REMEDY}.")


def _read_curves(path: Path) -> Curves:
    curves: Curves = {}
    for number, row in enumerate(read_rows(path) if path.is_file() else (), 2):
        try:
            step = float(row.pop("step", number - 2))
            points = {key: float(text) for key, text in row.items() if key != "epoch"}
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a number ({error}); expected a CSVLogger file.") from error
        for key, value in points.items():
            if math.isfinite(value):
                curves.setdefault(key, []).append((step, value))
    return curves


def _read_alignment(path: Path) -> AlignmentMap | None:
    if (values := _read_json(path)) is None:  # a new test takes the old ones away
        return None
    try:
        rows = tuple(tuple(float(weight) for weight in row) for row in values["weights"])
        title = str(values.get("title", path.stem))
        student, teacher = (tuple(map(str, values[side])) for side in ("student", "teacher"))
        return AlignmentMap(title, student, teacher, rows)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: an alignment map needs student, teacher and weights ({error!r})."
        ) from error
