"""Floating-point operations of a fit, on all ranks: two for each product and sum."""

from __future__ import annotations

from collections.abc import Sequence

from dskd_lightning.planning.calculator.shapes import DataSize, Layout, Losses, ModelSize

__all__ = ["work"]

_STUDENT_PRODUCTS = {"sft": 2, "logits": 2, "dual": 4}
"""With the student's head, of a response token; one more where it trains."""
_TEACHER_PRODUCTS = {"sft": 0, "logits": 1, "dual": 3}


def work(
    student: ModelSize, teachers: Sequence[ModelSize], data: DataSize, losses: Losses, layout: Layout
) -> dict[str, float]:
    """Cause -> operations; a cached teacher reads the data once."""
    forward = _forward(student, data.length)
    passes = (2 if student.adapted else 3) + int(layout.checkpointing)
    found = {"student": data.epochs * data.padded * (passes * forward + 6.0 * student.adapted)}
    products = _STUDENT_PRODUCTS[losses.kind] + losses.student_products + int(student.trains_head)
    row = 2.0 * products * student.vocabulary * student.hidden + 5.0 * losses.projectors
    read, running = data.teacher_tokens or data.padded, 0.0
    for teacher in teachers:
        products = _TEACHER_PRODUCTS[losses.kind] + losses.teacher_products
        row += 2.0 * products * teacher.vocabulary * teacher.hidden
        running += read * _forward(teacher, read / max(1, data.examples))
    found["losses"] = data.epochs * data.responses * row
    found["teacher"] = running * (1 if layout.cached else data.epochs)
    return {cause: count for cause, count in found.items() if count}


def _forward(model: ModelSize, length: float) -> float:
    """Of a token in the decoder's layers; the upper triangle of attention is left out."""
    return 2.0 * (model.layered + length * model.attention * model.layers)
