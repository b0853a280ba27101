"""The table and the plot of a study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dskd_lightning.files import write_atomic
from dskd_lightning.runs.run_folder import TEACHER, RunFolder
from dskd_lightning.runs.tables import number_tables
from dskd_lightning.runs.text import visible
from dskd_lightning.study.worker import read_result

__all__ = ["DIVERGED", "FAILED", "summarise"]

DIVERGED = "diverged"
"""The loss became no number in training."""
FAILED = "failed"
"""The variant's process ended without a result; its log says why."""

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("perplexity_per_token", "perplexity", "{:.2f}"),
    ("perplexity_per_byte", "per byte", "{:.3f}"),
    ("kl", "KL to teacher", "{:.3f}"),
    ("agreement", "top-1 agreement", "{:.1%}"),
    ("aligned_kl", "KL (aligned)", "{:.3f}"),
    ("aligned_agreement", "agreement (aligned)", "{:.1%}"),
    ("rougeL", "ROUGE-L", "{:.1f}"),
    ("rougeL_std", "± over seeds", "{:.1f}"),
    ("training_seconds", "training s", "{:.0f}"),
    ("peak_memory_gib", "training GiB", "{:.1f}"),
    ("parameters", "parameters", "{:,.0f}"),
    ("decode_tokens_per_second", "tokens/s", "{:.1f}"),
    ("inference_peak_gib", "inference GiB", "{:.2f}"),
)
_COSTS = (
    ("training", "seconds", "training_seconds", 1),
    ("training", "peak_bytes", "peak_memory_gib", 2**30),
    ("efficiency", "parameters", "parameters", 1),
    ("efficiency", "decode_tokens_per_second", "decode_tokens_per_second", 1),
    ("efficiency", "peak_bytes", "inference_peak_gib", 2**30),
)
"""Of a run folder: which part, its key, what tables call it, and the unit."""
_CURVES = (
    ("val/perplexity_per_token", "perplexity"),
    ("val/kl", "KL to teacher"),
    ("val/agreement", "top-1 agreement"),
)


def summarise(
    output: Path,
    runs: Mapping[str, Path],
    report: bool = True,
    baseline: str | None = None,
    outcomes: Mapping[str, str] | None = None,
) -> None:
    """Print the table and write ``table.md``, ``table.json``, ``curves.png`` and, if wanted, the HTML report.

    Args:
        output: folder of the study.
        runs: name -> run folder of the variants that ended.
        report: also compare the tested runs' predictions with the baseline's.
        baseline: one of ``runs`` that was tested; None takes the first.
        outcomes: `DIVERGED` or `FAILED`, of those among ``runs`` that weren't tested.
    """
    outcomes = outcomes or {}
    folders = {name: RunFolder.read(path, name) for name, path in runs.items() if name not in outcomes}
    rows: dict[str, dict[str, Any]] = {
        name: {"outcome": outcomes[name]} if name in outcomes else _row(folders[name]) for name in runs
    }
    rows = _with_teacher(rows, folders)
    columns = [column for column in _COLUMNS if any(column[0] in row for row in rows.values())]
    cells = {
        name: [format_.format(row[key]) if key in row else "" for key, _, format_ in columns]
        for name, row in rows.items()
    }
    headings = ["", *(label for _, label, _ in columns)]
    if outcomes:
        headings.append("outcome")
        cells = {name: [*row, outcomes.get(name, "")] for name, row in cells.items()}
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" + "---:|" * (len(headings) - 1)]
    lines += ["| " + " | ".join([name, *row]) + " |" for name, row in cells.items()]
    write_atomic(output / "table.md", "\n".join(lines) + "\n")
    write_atomic(output / "table.json", json.dumps(rows, indent=2) + "\n")
    _plot(folders, output / "curves.png")
    if report and len(folders) > 1 and all(folder.predictions for folder in folders.values()):
        from dskd_lightning.comparison.compare_runs import compare_runs

        ordered = sorted(folders, key=lambda name: name != baseline)
        compare_runs([f"{name}={runs[name]}" for name in ordered], output=output / "report")
    console = Console()
    title = Text(f"{visible(output.name)}: held-out results")
    for table in number_tables(headings, [[n, *row] for n, row in cells.items()], console.width, title):
        console.print(table)
        console.print()
    print(f"table, curves and report are in {visible(str(output))}")


def _row(folder: RunFolder) -> dict[str, Any]:
    result = read_result(folder.path) or {}
    row = {key: float(value) for key, value in result.get("test", {}).items()}
    return row | _costs({"training": result.get("training"), "efficiency": folder.efficiency})


def _with_teacher(
    rows: dict[str, dict[str, Any]], folders: Mapping[str, RunFolder]
) -> dict[str, dict[str, Any]]:
    """What the teacher costs, where a run has measured it and the teacher's own hasn't: in a first row."""
    measured = next((found for run in folders.values() if (found := run.teacher_efficiency)), None)
    costs = _costs({"efficiency": measured})
    if not costs or "outcome" in rows.get(TEACHER, {}):
        return rows
    return {**({} if TEACHER in rows else {TEACHER: {}}), **rows} | {TEACHER: costs | rows.get(TEACHER, {})}


def _costs(parts: Mapping[str, Mapping[str, Any] | None]) -> dict[str, float]:
    found = {(part, key): value for part, values in parts.items() for key, value in (values or {}).items()}
    return {
        name: found[part, key] / unit
        for part, key, name, unit in _COSTS
        if found.get((part, key)) is not None
    }


def _plot(runs: Mapping[str, RunFolder], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = [(key, label) for key, label in _CURVES if any(key in run.curves for run in runs.values())]
    if not curves:
        return
    figure, axes = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.2), squeeze=False)
    for axis, (key, label) in zip(axes[0], curves, strict=True):
        for name, run in runs.items():
            if points := run.curves.get(key):
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set(xlabel="optimiser step", title=f"{label} (validation)")
        axis.grid(alpha=0.3)
        if "perplexity" in key:
            axis.set_yscale("log")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
