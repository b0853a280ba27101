"""A picture of how student tokens meet teacher tokens: attention against byte-exact groups."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dskd_lightning.alignment.exact import ExampleAlignment, group_overlap
from dskd_lightning.files import write_atomic
from dskd_lightning.runs.token_map import draw_token_map

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

__all__ = ["save_heatmap"]


def save_heatmap(
    path: str | os.PathLike[str],
    student_tokens: Sequence[str],
    teacher_tokens: Sequence[str],
    alignment: ExampleAlignment,
    attention: npt.ArrayLike | None = None,
    *,
    title: str = "",
    limit: int = 64,
) -> None:
    """Draw ``attention`` with the byte-exact groups outlined, as PNG.

    Args:
        path: file to write.
        student_tokens: ``n`` token texts, shown as they are (no mathtext).
        teacher_tokens: ``m`` token texts.
        alignment: the byte-exact groups.
        attention: ``[n, m]`` from the student's to the teacher's tokens, such as one example of
            ``CrossModelAttention``'s ``t2s``; None shades the groups themselves.
        title: shown above.
        limit: most tokens to draw on a side; the title says if there are more.

    Raises:
        ValueError: sizes don't fit each other, or a side has no token.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import findfont, get_font
    from matplotlib.patches import Rectangle

    sizes = len(student_tokens), len(teacher_tokens)
    values = group_overlap(alignment) if attention is None else np.asarray(attention, np.float64)
    if values.shape != sizes or sizes != (len(alignment.student_group), len(alignment.teacher_group)):
        raise ValueError(
            f"{sizes[0]} student and {sizes[1]} teacher tokens need a matrix of that shape, not "
            f"{values.shape}, and an alignment of the same tokens"
        )
    if 0 in sizes:
        raise ValueError("a side has no token: there is nothing to draw")
    shown = min(sizes[0], limit), min(sizes[1], limit)
    figure = Figure(figsize=(2.2 + 0.24 * shown[1], 1.8 + 0.24 * shown[0]), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    font = get_font(findfont("DejaVu Sans"))
    draw_token_map(
        axes,
        values[: shown[0], : shown[1]],
        student_tokens[: shown[0]],
        teacher_tokens[: shown[1]],
        lambda token: _drawable(token, font),
        labels=limit,
        scale=None if attention is None else "attention",
    )
    for group in range(alignment.groups):
        rows = np.flatnonzero(alignment.student_group[: shown[0]] == group)
        columns = np.flatnonzero(alignment.teacher_group[: shown[1]] == group)
        if len(rows) and len(columns):
            corner = columns[0] - 0.5, rows[0] - 0.5
            axes.add_patch(
                Rectangle(corner, len(columns), len(rows), fill=False, edgecolor="C1", linewidth=1)
            )
    cut = "" if shown == sizes else f" (first {shown[0]} x {shown[1]} of {sizes[0]} x {sizes[1]} tokens)"
    axes.set_title(_drawable(title, font) + cut, fontsize=9)
    axes.title.set_parse_math(False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    write_atomic(path, buffer.getvalue())


def _drawable(text: str, font: FT2Font) -> str:
    """``text`` with characters that the font lacks as escapes."""
    return "".join(
        char if font.get_char_index(ord(char)) else char.encode("unicode_escape").decode() for char in text
    )
