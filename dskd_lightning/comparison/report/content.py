"""What the report says, as plain data for the template."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dskd_lightning.comparison.against_teacher import AgainstTeacher, teacher_columns
from dskd_lightning.comparison.compare import Comparison
from dskd_lightning.comparison.gate import Condition
from dskd_lightning.comparison.self_consistency import SelfConsistency, self_consistency_columns
from dskd_lightning.evaluation.metrics import DistinctN
from dskd_lightning.evaluation.scores import PROMPT_METRICS, score_run
from dskd_lightning.runs.predictions import describe_problems
from dskd_lightning.runs.run_folder import RunFolder
from dskd_lightning.runs.text import shorten

__all__ = [
    "GateResult",
    "Table",
    "config_changes",
    "headline",
    "number",
    "run_tables",
    "self_consistency_tables",
    "teacher_tables",
    "warnings_of",
]


_LONGEST_CELL = 400


@dataclass(frozen=True)
class GateResult:
    """A ``--fail-if`` condition checked on one candidate."""

    condition: Condition
    candidate: str
    failed: bool


@dataclass(frozen=True)
class Table:
    """A table of text and numbers; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


def number(value: object) -> str:
    """A value as tables show it: four significant digits, thousands grouped, a dash for None."""
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if value != value or abs(value) == float("inf"):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}"


def headline(comparisons: Sequence[Comparison]) -> str:
    """The verdict in one sentence."""
    metric = comparisons[0].metric
    sign = 1 if metric.higher_is_better else -1
    best = max(comparisons, key=lambda comparison: sign * comparison.test.mean)
    better = [comparison for comparison in comparisons if comparison.outcome == "better"]
    if better:
        best = max(better, key=lambda comparison: sign * comparison.test.mean)
        return f"{best.candidate} is better than {best.baseline}: {metric.label} {best.test.mean:+.2f}"
    if all(comparison.outcome == "worse" for comparison in comparisons):
        subject = best.candidate if len(comparisons) == 1 else "Every other run"
        return f"{subject} is worse than {best.baseline} on {metric.label}"
    return f"No run can be told to be better than {best.baseline} on {metric.label}"


def warnings_of(runs: Iterable[RunFolder]) -> list[str]:
    """Sentences about empty or endless responses of each run, over all its seeds."""
    return [
        f"{run.name}: {problem}"
        for run in runs
        for problem in describe_problems([p for predictions in run.predictions.values() for p in predictions])
    ]


def run_tables(runs: Sequence[RunFolder]) -> list[Table]:
    """Generated responses, final numbers, and efficiency where it was measured."""
    columns = ["run"]
    seeds = max(len(run.predictions) for run in runs)
    kind = "seeds" if all(len(run.trainings()) == 1 for run in runs) else "samplings"
    for metric in PROMPT_METRICS:
        spread = [f"± over {seeds} {kind}"] if metric.name == "rougeL" and seeds > 1 else []
        columns += [metric.label, *spread]
    rows = []
    for run in runs:
        row: list[object] = [run.name]
        for metric in PROMPT_METRICS:
            scores = score_run(run, metric)
            row += [scores.mean]
            row += [scores.seed_deviation] if metric.name == "rougeL" and seeds > 1 else []
        rows.append((*row, _distinct(run, 1), _distinct(run, 2)))
    tables = [Table("Generated responses", (*columns, "distinct-1", "distinct-2"), tuple(rows))]
    names = sorted({name for run in runs for name in run.metrics})
    if names:
        values = tuple((name, *(run.metrics.get(name) for run in runs)) for name in names)
        tables.append(Table("Final numbers", ("metric", *(run.name for run in runs)), values))
    measured = [(run.name, run.efficiency) for run in runs if run.efficiency]
    teachers = [(f"{run.name}: teacher", run.teacher_efficiency) for run in runs if run.teacher_efficiency]
    measured += teachers
    if measured:
        tables.append(_cost_table("Efficiency", measured))
    trained = [(run.name, run.training) for run in runs if run.training]
    if trained:
        tables.append(_cost_table("Cost of training", trained))
    analysed = [(run.name, run.representation) for run in runs if run.representation]
    if analysed:
        tables.append(_representation_table(analysed))
    return tables


def teacher_tables(beside: Sequence[AgainstTeacher]) -> list[Table]:
    """What is left of the teacher at what cost, and the prompts on which a run is furthest from it."""
    if not beside:
        return []
    labels, values = teacher_columns(beside)
    rows = tuple((item.run, *row) for item, row in zip(beside, values, strict=True))
    furthest = tuple(
        (item.run, f"{far.index}", far.consistency, *map(_shown, (far.prompt, far.response, far.teachers)))
        for item in beside
        for far in item.furthest
    )
    columns = ("run", "number", "ROUGE-L", "prompt", "response", "teacher's response")
    return [
        Table("Beside the teacher", ("run", *labels), rows),
        Table("Furthest from the teacher's responses", columns, furthest),
    ]


def self_consistency_tables(items: Sequence[SelfConsistency]) -> list[Table]:
    """How alike a run's answers to different wordings are, and where they are least alike."""
    if not items:
        return []
    labels, values = self_consistency_columns(items)
    rows = tuple((item.run, *row) for item, row in zip(items, values, strict=True))
    worst = tuple(
        (item.run, pair.consistency, *map(_shown, (pair.first.prompt, pair.first.response)),
         *map(_shown, (pair.second.prompt, pair.second.response)))
        for item in items
        for pair in item.worst
    )  # fmt: skip
    columns = ("run", "ROUGE-L", "prompt", "response", "in other words", "response")
    return [
        Table("The same question in other words", ("run", *labels), rows),
        Table("Least like each other", columns, worst),
    ]


def _shown(text: str) -> str:
    return shorten(text, _LONGEST_CELL)


def _cost_table(title: str, measured: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """One row per run; a column for each number that any of them has."""
    keys = [
        key
        for key, value in measured[0][1].items()
        if not isinstance(value, (list, tuple, dict))
        and any(values.get(key) is not None for _, values in measured)
    ]
    titles = [key.replace("_bytes", " MB").replace("_", " ") for key in keys]
    rows = tuple((name, *(_unit(key, values.get(key)) for key in keys)) for name, values in measured)
    return Table(title, ("run", *titles), rows)


def _representation_table(analysed: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """Distances of the student's hidden states from the teacher's; "before" where it was measured."""
    names = ("structure_distance_cosine", "structure_distance_inner_product", "cka")
    titles = ("structure distance (cosine)", "structure distance (inner product)", "CKA")
    rows: list[tuple[object, ...]] = []
    for run, values in analysed:
        for stage, label in (("before", f"{run}, before training"), ("after", run)):
            if measured := values.get(stage):
                rows.append((label, *(measured.get(name) for name in names)))
    return Table("Hidden states against the teacher's", ("run", *titles), tuple(rows))


def config_changes(baseline: RunFolder, run: RunFolder) -> list[str]:
    """Lines of the configuration that differ from the baseline's, in unified-diff form."""
    if baseline.config is None or run.config is None:
        return []
    before, after = baseline.config.splitlines(), run.config.splitlines()
    lines = difflib.unified_diff(before, after, baseline.name, run.name, lineterm="", n=2)
    return list(lines)


def _unit(key: str, value: object) -> object:
    return value / 1e6 if key.endswith("_bytes") and isinstance(value, (int, float)) else value


def _distinct(run: RunFolder, n: int) -> float:
    metric = DistinctN(n)
    for predictions in run.predictions.values():
        metric.update([prediction.response for prediction in predictions])
    return round(float(metric.compute()), 4)
