"""The report's plots, drawn once and kept as SVG and PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from dskd_lightning.comparison.compare import Comparison
from dskd_lightning.runs.run_folder import AlignmentMap
from dskd_lightning.runs.text import shorten, visible
from dskd_lightning.runs.token_map import draw_token_map

__all__ = ["INK", "RULE", "Plot", "curve_plot", "difference_plot", "heatmap", "quality_cost_plot"]

INK, RULE = "#24292e", "#d0d7dd"
"""Colours of text and of rules; the report replaces them by the theme's."""
PALETTE = ("#7d8590", "#2f81f7", "#d9730d", "#1a9850", "#bf4bd1", "#0f97a5", "#e5484d", "#a08000")
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Plot:
    """A finished plot.

    Args:
        name: file name without its ending.
        caption: what is shown, in words.
        svg: the SVG document.
        png: the PNG file.
    """

    name: str
    caption: str
    svg: str
    png: bytes


def difference_plot(comparisons: Sequence[Comparison]) -> Plot:
    """Mean difference to the baseline with its interval, one row per candidate."""
    metric = comparisons[0].metric

    def draw(axes: Any) -> None:
        axes.axvline(0, color=PALETTE[0], linewidth=1)
        for row, item in enumerate(comparisons):
            color, test = _style(row + 1)[0], item.test
            axes.plot([test.low, test.high], [row, row], color=color, linewidth=2.5, solid_capstyle="butt")
            axes.plot([test.mean], [row], _style(row + 1)[1], color=color, markersize=7)
        axes.set_yticks(range(len(comparisons)), [_label(item.candidate, 18) for item in comparisons])
        axes.set_ylim(len(comparisons) - 0.4, -0.6)
        axes.set_xlabel(f"{metric.label}, difference from {_label(comparisons[0].baseline, 18)}")
        axes.grid(axis="y", visible=False)

    confidence = comparisons[0].test.confidence
    caption = f"Difference in {metric.label} with its {confidence:.0%} interval, paired over prompts."
    return _plot("difference", caption, draw, height=1.1 + 0.42 * len(comparisons))


def curve_plot(name: str, metric: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Plot:
    """One metric over the training steps, one line per run (key order gives the colour; empty lines skip)."""

    def draw(axes: Any) -> None:
        for index, (run, points) in enumerate(curves.items()):
            if points:
                color, marker = _style(index)
                few = len(points) <= 25
                steps, values = zip(*points, strict=True)
                axes.plot(
                    steps,
                    values,
                    color=color,
                    marker=marker if few else None,
                    markersize=4,
                    label=_label(run, 22),
                )
        axes.set_xlabel("step")
        _legend(axes)

    return _plot(name, f"{visible(metric)} over training steps.", draw, title=_label(metric, 44))


def spectrum_plot(name: str, projector: str, values: Mapping[str, Sequence[float]]) -> Plot:
    """Singular values of one projector, descending, one line per run."""

    def draw(axes: Any) -> None:
        for index, (run, spectrum) in enumerate(values.items()):
            if spectrum:
                color, _ = _style(index)
                axes.plot(range(1, len(spectrum) + 1), spectrum, color=color, label=_label(run, 22))
        positive = [value for spectrum in values.values() for value in spectrum if value > 0]
        if positive and max(positive) > 20 * min(positive):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("rank")
        axes.set_ylabel("singular value")
        _legend(axes)

    return _plot(name, f"Singular values of {visible(projector)}.", draw, title=_label(projector, 44))


def quality_cost_plot(metric: str, cost: str, points: Mapping[str, tuple[float, float] | None]) -> Plot:
    """Quality against cost, one mark per run: up and to the left is better."""

    def draw(axes: Any) -> None:
        for index, (run, point) in enumerate(points.items()):
            if point is not None:
                color, marker = _style(index)
                axes.plot(
                    *[[value] for value in point], marker, color=color, markersize=8, label=_label(run, 22)
                )
        axes.margins(0.15)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(cost)
        axes.set_ylabel(metric)
        _legend(axes)

    return _plot("quality_cost", f"{metric} against {cost}: up and to the left is better.", draw)


def heatmap(name: str, alignment: AlignmentMap) -> Plot:
    """Alignment weights, the student's tokens down and the teacher's across."""

    def draw(axes: Any) -> None:
        draw_token_map(axes, alignment.weights, alignment.student, alignment.teacher, _tick, scale="weight")

    height = min(7.0, 1.6 + 0.16 * min(len(alignment.student), 40))
    return _plot(name, f"Alignment weights: {visible(alignment.title)}.", draw, height=height)


def _plot(
    name: str, caption: str, draw: Callable[[Any], None], *, title: str | None = None, height: float = 3.1
) -> Plot:
    with _style_context(name):
        figure = Figure(figsize=(4.8, height), layout="constrained")
        axes = figure.subplots()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        draw(axes)
        if title:
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", facecolor="white", metadata={"Date": None})
        figure.savefig(png, format="png", facecolor="white", dpi=180)
    return Plot(name, caption, svg.getvalue(), png.getvalue())


@contextmanager
def _style_context(salt: str) -> Iterator[None]:
    settings: Any = {
        "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and themed
        "svg.hashsalt": salt,
        "text.parse_math": False,  # a dollar sign in a run's name is a dollar sign
        "font.size": 9,
        "font.family": "sans-serif",
        "axes.edgecolor": RULE,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.8,
        **dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color"], INK),
    }
    with matplotlib.rc_context(settings):
        yield


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=INK, fontsize=8)


def _style(index: int) -> tuple[str, str]:
    return PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]


def _tick(token: str) -> str:
    return _label(token.replace("\n", "↵").replace(" ", "␣"), 12)


def _label(text: str, limit: int) -> str:
    # Matplotlib hides legend entries that start with an underscore.
    label = shorten(visible(text).replace("\n", " "), limit)
    return "\u200b" + label if label.startswith("_") else label
