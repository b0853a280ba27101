"""Bytes on the disk, and in the host's memory for what grows with the data."""

from __future__ import annotations

from collections.abc import Sequence

from dskd_lightning.planning.calculator.shapes import DataSize, Layout, Losses, ModelSize
from dskd_lightning.teacher_cache.codecs import bytes_per_token

__all__ = ["disk", "host"]

_TOKEN_BYTES = 4
_RESPONSE_BYTES = 5  # where a token ends in its text, and what it is
_RENDERED_BYTES = 40  # of one example for one model: offsets, counts, length
_EXAMPLE_BYTES = 100  # of one example of two messages beside its text: roles, source, offsets
_TEXT_BYTES = 4.5  # of a token, where nothing is known
_CHECKPOINTS = 2  # the last and the best
_PLANNED_BYTES = 37  # of one example while an epoch is planned with packing; without, less
_ROW_BYTES = 12  # of one example: its row, and its length for the model that needs most
_FEW = 2**31
"""From here on plans count in 64 bits."""
_INDEX_BYTES = 12  # of one example in a teacher cache


def disk(
    student: ModelSize, teachers: Sequence[ModelSize], data: DataSize, losses: Losses, layout: Layout
) -> dict[str, float]:
    """Cause -> bytes of a run, with the best checkpoint beside the last."""
    # A response is kept twice, as a message and as a reference to compare answers with.
    guessed = _TEXT_BYTES * (data.tokens + data.responses) + _EXAMPLE_BYTES * data.examples
    raw = guessed if data.raw_bytes is None else data.raw_bytes
    tokens = data.tokens + len(teachers) * (data.teacher_tokens or data.tokens)
    answered = (1 + len(teachers)) * data.responses
    saved = (4.0 * student.adapted or student.bytes) + 4.0 * losses.projectors
    states = layout.states * (student.trained_bytes + 4.0 * losses.projectors)
    prepared = (
        raw
        + _TOKEN_BYTES * tokens
        + _RESPONSE_BYTES * answered
        + data.examples * (1 + len(teachers)) * _RENDERED_BYTES
    )
    found = {
        "prepared data": prepared if data.disk_limit is None else min(prepared, float(data.disk_limit)),
        "checkpoints": _CHECKPOINTS * (saved + states),
    }
    if layout.cached:
        each = (bytes_per_token(teacher.hidden, layout.codec) for teacher in teachers)
        found["teacher cache"] = data.responses * sum(each) + 4.0 * data.examples * len(teachers)
    return {cause: size for cause, size in found.items() if size}


def host(teachers: Sequence[ModelSize], data: DataSize, layout: Layout) -> dict[str, float]:
    """Cause -> bytes of the host's memory for one rank: what grows with data or stays off a GPU."""
    wide = 2 if data.examples >= _FEW else 1
    found = {
        "plan of an epoch": float(_PLANNED_BYTES * wide * data.examples),
        "rows and lengths": (_ROW_BYTES + 4.0 * (1 + len(teachers))) * data.examples,
    }
    if layout.cached:
        found["places in the teacher cache"] = float(_INDEX_BYTES * len(teachers) * data.examples)
    elif layout.cuda and (offloaded := sum(model.layer_bytes for model in teachers if model.offloaded)):
        found["teacher's layers"] = offloaded
    return found
