"""Renders the report and writes it with its plots."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dskd_lightning.comparison.against_teacher import AgainstTeacher
from dskd_lightning.comparison.compare import Comparison
from dskd_lightning.comparison.report import content, plots
from dskd_lightning.comparison.report.examples import collect_examples
from dskd_lightning.comparison.report.svg import inline_svg
from dskd_lightning.comparison.self_consistency import SelfConsistency
from dskd_lightning.files import write_atomic
from dskd_lightning.runs.run_folder import RunFolder
from dskd_lightning.runs.text import visible

__all__ = ["ReportData", "write_report"]

_PACKAGE = "dskd_lightning.comparison.report"


@dataclass(frozen=True)
class ReportData:
    """What goes into a report.

    Args:
        runs: the baseline first, then the candidates in the order of ``comparisons``.
        comparisons: every candidate against the baseline.
        gates: conditions that were checked.
        judge: candidate -> counts of ``JudgeSummary``, where a judge was asked.
        title: title of the page.
        max_examples: most prompts shown with their responses.
        max_curves: most curves shown, validation first.
        beside_teacher: each run beside its teacher, where that is among them.
        beside_itself: each run's answers to different wordings of a question, where there are such.
    """

    runs: Sequence[RunFolder]
    comparisons: Sequence[Comparison]
    gates: Sequence[content.GateResult] = ()
    judge: dict[str, dict[str, int]] | None = None
    title: str = "Run comparison"
    max_examples: int = 200
    max_curves: int = 12
    beside_teacher: Sequence[AgainstTeacher] = ()
    beside_itself: Sequence[SelfConsistency] = ()


def write_report(data: ReportData, folder: str | os.PathLike[str]) -> Path:
    """Write ``FOLDER/report.html`` and ``FOLDER/plots/*.svg|png``; returns the HTML file.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    difference = [plots.difference_plot(data.comparisons)]
    curves, curves_left = _curves(data)
    scatter = _scatter(data)
    spectra = _spectra(data)
    maps = [
        (run.name, plots.heatmap(f"alignment_{i}_{j}", alignment))
        for i, run in enumerate(data.runs)
        for j, alignment in enumerate(run.alignments)
    ]
    for plot in (*difference, *curves, *scatter, *spectra, *(plot for _, plot in maps)):
        write_atomic(folder / "plots" / f"{plot.name}.svg", plot.svg)
        write_atomic(folder / "plots" / f"{plot.name}.png", plot.png)
    examples, example_count = collect_examples(data.comparisons, data.runs, data.max_examples)
    html = render(
        data=data,
        headline=content.headline(data.comparisons),
        warnings=content.warnings_of(data.runs),
        difference=difference,
        curves=curves,
        curves_left=curves_left,
        scatter=scatter,
        spectra=spectra,
        maps=maps,
        tables=[
            *content.teacher_tables(data.beside_teacher),
            *content.self_consistency_tables(data.beside_itself),
            *content.run_tables(data.runs),
        ],
        examples=examples,
        example_count=example_count,
        seeds=list(data.runs[0].trainings()[0]),
        trainings=[len(run.trainings()) for run in data.runs],
        changes={run.name: content.config_changes(data.runs[0], run) for run in data.runs[1:]},
    )
    path = folder / "report.html"
    write_atomic(path, html)
    return path


def render(**context: Any) -> str:
    """The page as text; every value is escaped unless it is `Markup`."""
    resources = files(_PACKAGE)
    script = (resources / "script.js").read_text(encoding="utf-8")
    style = (resources / "style.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader(_PACKAGE, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters["number"] = content.number
    environment.filters["inline_svg"] = inline_svg
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template("template.html")
    return template.render(script=Markup(script), style=Markup(style), script_digest=digest, **context)


def _curves(data: ReportData) -> tuple[list[plots.Plot], int]:
    every = {name for run in data.runs for name in run.curves}
    names = sorted((name for name in every if not _repeated(name, every)), key=_curve_order)
    shown = names[: data.max_curves]
    drawn = [
        plots.curve_plot(f"curve_{i}", name, {run.name: run.curves.get(name, []) for run in data.runs})
        for i, name in enumerate(shown)
    ]
    return drawn, len(names) - len(shown)


def _repeated(name: str, every: Collection[str]) -> bool:
    """Whether a perplexity beside it says the same."""
    return "nll_per_" in name and name.replace("nll_per_", "perplexity_per_") in every


def _curve_order(name: str) -> tuple[int, str]:
    """Validation first, then the loss and its terms, what was monitored, schedules last."""
    order = ("val/", "train/loss", "train/", "monitor/")
    return next((i for i, prefix in enumerate(order) if name.startswith(prefix)), len(order)), name


def _spectra(data: ReportData) -> list[plots.Plot]:
    """Singular values of each projector that a run has, largest first, one line per run."""
    by_run = {run.name: (run.representation or {}).get("projectors") or {} for run in data.runs}
    names = sorted({name for projectors in by_run.values() for name in projectors})
    return [
        plots.spectrum_plot(
            f"spectrum_{i}",
            name,
            {run: projectors.get(name, {}).get("singular_values", []) for run, projectors in by_run.items()},
        )
        for i, name in enumerate(names)
    ]


def _scatter(data: ReportData) -> list[plots.Plot]:
    """Quality against size or, where the students are of one size, against the time of training."""
    scores = [
        data.comparisons[0].baseline_scores,
        *(comparison.candidate_scores for comparison in data.comparisons),
    ]
    sizes = [(run.efficiency or {}).get("parameters") for run in data.runs]
    seconds = [(run.training or {}).get("seconds") for run in data.runs]
    for label, costs in (("parameters", sizes), ("seconds of training", seconds)):
        if len({cost for cost in costs if cost}) > 1:
            points = {
                run.name: (float(cost), score.mean) if cost else None
                for run, cost, score in zip(data.runs, costs, scores, strict=True)
            }
            return [plots.quality_cost_plot(data.comparisons[0].metric.label, label, points)]
    return []  # nothing to trade
