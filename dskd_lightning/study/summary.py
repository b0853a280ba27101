"""The table and the plot of a study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dskd_lightning.files import write_atomic
from dskd_lightning.runs.run_folder import RunFolder
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
    ("peak_memory_gib", "peak GiB", "{:.1f}"),
)
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
    rows: dict[str, dict[str, Any]] = {
        name: {"outcome": outcomes[name]} if name in outcomes else _row(folder)
        for name, folder in runs.items()
    }
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
    tested = {name: path for name, path in runs.items() if name not in outcomes}
    folders = {name: RunFolder.read(path, name) for name, path in tested.items()}
    _plot(folders, output / "curves.png")
    if report and len(tested) > 1 and all(folder.predictions for folder in folders.values()):
        from dskd_lightning.comparison.compare_runs import compare_runs

        ordered = sorted(tested.items(), key=lambda run: run[0] != baseline)
        compare_runs([f"{name}={path}" for name, path in ordered], output=output / "report")
    console = Console()
    title = Text(f"{visible(output.name)}: held-out results")
    for table in number_tables(headings, [[n, *row] for n, row in cells.items()], console.width, title):
        console.print(table)
        console.print()
    print(f"table, curves and report are in {visible(str(output))}")


def _row(folder: Path) -> dict[str, float]:
    result: dict[str, Any] = read_result(folder) or {}
    row = {key: float(value) for key, value in result.get("test", {}).items()}
    cost = result.get("training") or {}
    for key, name, unit in (("seconds", "training_seconds", 1), ("peak_bytes", "peak_memory_gib", 2**30)):
        if key in cost:
            row[name] = cost[key] / unit
    return row


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
