"""A heatmap of weights between two sequences of tokens, for a picture and for a report alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["draw_token_map"]


def draw_token_map(
    axes: Any,
    weights: npt.ArrayLike,
    student: Sequence[str],
    teacher: Sequence[str],
    label: Callable[[str], str],
    *,
    labels: int = 40,
    scale: str | None = None,
) -> None:
    """Draw ``weights``, the student's tokens down and the teacher's across.

    Args:
        axes: Matplotlib's, to draw into.
        weights: ``[n, m]``, none below zero.
        student: ``n`` token texts.
        teacher: ``m`` token texts.
        label: makes a tick's text of a token.
        labels: most ticks on a side; of more tokens every second, third ... has one.
        scale: what the colours mean, beside a bar of them; None draws no bar.
    """
    values = np.asarray(weights, np.float64)
    top = max(float(values.max(initial=0)), 1e-9)
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
    axes.grid(visible=False)
    for ticks, tokens, rotation in ((axes.set_xticks, teacher, 90), (axes.set_yticks, student, 0)):
        every = max(1, math.ceil(len(tokens) / labels))
        ticks(range(0, len(tokens), every), [label(token) for token in tokens[::every]], rotation=rotation)
    axes.tick_params(labelsize=7)
    for tick in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        tick.set_parse_math(False)
    axes.set_xlabel("teacher")
    axes.set_ylabel("student")
    if scale is not None:
        axes.figure.colorbar(image, ax=axes, label=scale, fraction=0.04, pad=0.02)
