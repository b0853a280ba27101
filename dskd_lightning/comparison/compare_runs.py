"""The ``dskd compare`` command: runs in, verdict, report and exit code out."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dskd_lightning.comparison.against_teacher import (
    AgainstTeacher,
    against_teacher,
    resolve_teacher,
    teacher_columns,
)
from dskd_lightning.comparison.compare import Comparison, compare_all
from dskd_lightning.comparison.gate import Condition, Measured, parse_condition
from dskd_lightning.comparison.judge import judgement_counts
from dskd_lightning.comparison.report import GateResult, ReportData, write_report
from dskd_lightning.comparison.self_consistency import (
    SelfConsistency,
    self_consistency,
    self_consistency_columns,
)
from dskd_lightning.comparison.trainings import open_trainings, pooled
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.scores import PROMPT_METRICS, prompt_metric
from dskd_lightning.files import replacing, write_object
from dskd_lightning.runs.run_folder import RunFolder
from dskd_lightning.runs.tables import number_tables
from dskd_lightning.runs.text import visible

__all__ = ["check_gates", "compare_runs"]

logger = logging.getLogger(__name__)


def compare_runs(
    runs: Sequence[str | os.PathLike[str]],
    *,
    metric: str = "rougeL",
    fail_if: Sequence[str] = (),
    output: str | os.PathLike[str] = "comparison",
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    max_examples: int = 200,
    judge: Sequence[str] = (),
    console: Console | None = None,
) -> int:
    """Compare runs with the first of them, write the report, check the conditions.

    Writes ``report.html``, ``plots/``, ``comparison.json`` and ``regressions.jsonl`` under ``output``.

    Args:
        runs: run folders, the baseline first; ``NAME=FOLDER`` gives a run another name; ``A,B,C`` are
            training runs of one method: a prompt's score is the mean over all their responses; ``teacher``
            is that of the others, once it was tested (``dskd test --model teacher``).
        metric: one of the metrics with a value per prompt (`scores.PROMPT_METRICS`).
        fail_if: conditions as in `gate`.
        output: folder of the report.
        resamples: bootstrap and permutation resamples.
        confidence: coverage of the interval.
        seed: of the resampling.
        max_examples: most prompts shown in the report.
        judge: ``CANDIDATE=FILE``, verdicts of `judge_pairs` against the baseline.
        console: where the summary is printed.

    Returns:
        0, or 1 where a condition of ``fail_if`` holds.

    Raises:
        UserError: a condition, a metric or a run is unusable, or runs answer different prompts.
    """
    conditions = [parse_condition(text) for text in fail_if]
    chosen = prompt_metric(metric)
    opened = [open_trainings(run) for run in resolve_teacher([os.fspath(run) for run in runs])]
    for mixture in (text for several in opened for folder in several for text in folder.mixtures()):
        logger.warning("%s", mixture)
    folders = [pooled(several) for several in opened]
    options: dict[str, Any] = {"resamples": resamples, "confidence": confidence, "seed": seed}
    comparisons = compare_all(folders, chosen, **options)
    gates = check_gates(conditions, folders, comparisons, options)
    beside, itself = against_teacher(folders), self_consistency([several[0] for several in opened])
    output = Path(output)
    verdicts = _verdicts(judge, [run.name for run in folders[1:]])
    report = write_report(
        ReportData(
            folders,
            comparisons,
            gates,
            judge=verdicts,
            max_examples=max_examples,
            beside_teacher=beside,
            beside_itself=itself,
        ),
        output,
    )
    summary = _summary(comparisons, gates)
    if beside:
        summary["against_teacher"] = [asdict(item) for item in beside]
    if itself:
        summary["self_consistency"] = [_numbers(item) for item in itself]
    write_object(output / "comparison.json", summary)
    with (
        replacing(output / "regressions.jsonl") as temporary,
        temporary.open("w", encoding="utf-8", errors="replace") as file,
    ):
        file.writelines(_regressions(comparisons, folders))
    _print(console or Console(), comparisons, gates, report, beside, itself)
    return int(any(gate.failed for gate in gates))


def _numbers(item: SelfConsistency) -> dict[str, Any]:
    """As JSON; of the worst pairs the indices of the prompts."""
    pairs = [[pair.first.index, pair.second.index] for pair in item.worst]
    return {**{key: value for key, value in vars(item).items() if key != "worst"}, "worst": pairs}


def _verdicts(judge: Sequence[str], candidates: Sequence[str]) -> dict[str, dict[str, int]] | None:
    verdicts = {}
    for entry in judge:
        name, separator, file = entry.partition("=")
        if not separator or name not in candidates:
            raise UserError(f"--judge {entry!r}: write CANDIDATE=FILE, one of {', '.join(candidates)}.")
        verdicts[name] = judgement_counts(file)
    return verdicts or None


def check_gates(
    conditions: Sequence[Condition],
    runs: Sequence[RunFolder],
    comparisons: Sequence[Comparison],
    options: dict[str, Any],
) -> list[GateResult]:
    """Every condition on every candidate; ``options`` go to `compare_all` for other metrics.

    Raises:
        UserError: a condition names a metric that a run does not have.
    """
    tested = {comparisons[0].metric.name.lower(): list(comparisons)}
    results = []
    for condition in conditions:
        name = condition.metric.lower()
        if name not in tested and name in {metric.name.lower() for metric in PROMPT_METRICS}:
            tested[name] = compare_all(runs, prompt_metric(name), **options)
        for position, run in enumerate(runs[1:]):
            if name in tested:
                item = tested[name][position]
                means = item.baseline_scores.mean, item.candidate_scores.mean
                measured = Measured(*means, item.adjusted_p_value)
            else:
                measured = Measured(runs[0].metrics.get(condition.metric), _final(run, condition))
            results.append(GateResult(condition, run.name, condition.holds(measured)))
    return results


def _final(run: RunFolder, condition: Condition) -> float:
    if condition.metric not in run.metrics:
        known = ", ".join(sorted([*(metric.name for metric in PROMPT_METRICS), *run.metrics]))
        raise UserError(
            f"--fail-if {condition.text!r}: {run.path} has no {condition.metric}; it has {known}."
        )
    return run.metrics[condition.metric]


def _summary(comparisons: Sequence[Comparison], gates: Sequence[GateResult]) -> dict[str, Any]:
    return {
        "metric": comparisons[0].metric.name,
        "baseline": comparisons[0].baseline,
        "baseline_mean": comparisons[0].baseline_scores.mean,
        "candidates": [
            {
                "name": item.candidate,
                "mean": item.candidate_scores.mean,
                "seed_deviation": item.candidate_scores.seed_deviation,
                "difference": asdict(item.test),
                "adjusted_p_value": item.adjusted_p_value,
                "outcome": item.outcome,
                "wins": item.wins,
                "ties": item.ties,
                "losses": item.losses,
            }
            for item in comparisons
        ],
        "gates": [
            {"condition": g.condition.text, "candidate": g.candidate, "failed": g.failed} for g in gates
        ],
    }


def _regressions(comparisons: Sequence[Comparison], runs: Sequence[RunFolder]) -> Iterator[str]:
    seed = next(iter(runs[0].trainings()[0]))
    before = {p.index: p for p in runs[0].trainings()[0][seed]}
    for item, run in zip(comparisons, runs[1:], strict=True):
        after = {p.index: p for p in run.trainings()[0][seed]}
        for change in item.regressions:
            record = {
                "candidate": item.candidate,
                **vars(change),
                "prompt": before[change.index].prompt,
                "references": before[change.index].references,
                "baseline_response": before[change.index].response,
                "candidate_response": after[change.index].response,
            }
            yield json.dumps(record, ensure_ascii=False) + "\n"


def _print(
    console: Console,
    comparisons: Sequence[Comparison],
    gates: Sequence[GateResult],
    report: Path,
    beside: Sequence[AgainstTeacher] = (),
    itself: Sequence[SelfConsistency] = (),
) -> None:
    first = comparisons[0]
    title = Text(f"{first.metric.label} against {visible(first.baseline)} ({first.baseline_scores.mean:.2f})")
    headings = ("run", "mean", f"difference ({first.test.confidence:.0%})", "p", "win/tie/loss", "")
    styles = {"better": "green", "worse": "red", "undecided": "dim"}
    rows: list[list[str | Text]] = [
        [
            visible(item.candidate),
            f"{item.candidate_scores.mean:.2f}",
            f"{item.test.mean:+.2f} ({item.test.low:+.2f}, {item.test.high:+.2f})",
            f"{item.adjusted_p_value:.2g}",
            f"{item.wins}/{item.ties}/{item.losses}",
            Text(item.outcome, style=styles[item.outcome]),
        ]
        for item in comparisons
    ]
    for table in number_tables(headings, rows, console.width, title):
        console.print(table)
    if beside:
        _print_rows(console, "beside the teacher", [i.run for i in beside], teacher_columns(beside))
    if itself:
        title_of = "the same question in other words"
        _print_rows(console, title_of, [i.run for i in itself], self_consistency_columns(itself))
    for gate in gates:
        word = Text("failed", style="bold red") if gate.failed else Text("passed", style="green")
        console.print(
            Text.assemble(word, f"  {visible(gate.candidate)}: fail if {visible(gate.condition.text)}")
        )
    console.print(Text(f"Report: {report}"))


def _print_rows(
    console: Console, title: str, names: Sequence[str], columns: tuple[list[str], list[list[float | None]]]
) -> None:
    labels, values = columns
    cells = [
        [visible(name), *("" if value is None else f"{value:.1f}" for value in row)]
        for name, row in zip(names, values, strict=True)
    ]
    for table in number_tables(["run", *labels], cells, console.width, Text(title)):
        console.print(table)
