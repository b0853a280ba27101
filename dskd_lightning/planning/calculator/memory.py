"""Bytes of one rank: what it keeps, and the most of what comes and goes."""

from __future__ import annotations

from collections.abc import Sequence

from dskd_lightning.functional.fused_distillation import fused_chunk
from dskd_lightning.planning.calculator.shapes import DataSize, Layout, Losses, ModelSize

__all__ = ["PROGRAM", "activation_bytes", "loss_bytes", "memory"]

PROGRAM = "program"
_PROGRAM_BYTES = 1.2e9
"""Python, torch and its kernels."""
_GATHERED = 3
"""Layers of a sharded model that are whole at once: in use, as they arrived, and the next one."""
_GRADIENTS = 2
"""Gradients of layers that are whole at once: as made, and as sent."""
_TILE_BYTES = 2 * 2**20
_TILES = {"sft": 2.25, "logits": 8.5, "dual": 8.5}
"""Tiles of float32 that a CPU works in, see `functional._tiles`; logits in 16 bits need one more a head."""


def memory(
    student: ModelSize, teachers: Sequence[ModelSize], data: DataSize, losses: Losses, layout: Layout
) -> dict[str, float]:
    """Cause -> bytes on one rank at the worst moment of a step; gradients live until the next backward."""
    shards = layout.shards
    own = student.trained_bytes + 4 * losses.projectors
    visiting = [layout.cached or (layout.cuda and model.offloaded) for model in teachers]
    held = [m.outer_bytes if v else m.bytes for m, v in zip(teachers, visiting, strict=True)]
    found = {
        "student's weights": student.bytes / shards,
        "teacher's weights": sum(held) / shards,
        "projectors": 4 * losses.projectors / shards + losses.fixed,
        "optimizer": layout.states * own / shards,
        "gradients": own / shards,
    }
    if layout.ranks > 1 and not layout.sharded:
        found["gradient buckets"] = own
    if layout.sharded:
        outer = student.outer_bytes + sum(model.outer_bytes for model in teachers)
        found["embeddings and heads, gathered"] = outer + 4 * losses.projectors
    short = 2.0 if layout.precision(student) == "mixed" else 0.0
    # The backward pass needs what weights are cast to, unless layers are computed again.
    cast = 0 if layout.checkpointing else student.layered + student.adapted
    found["weights in 16 bits"] = short * (cast + student.vocabulary * student.hidden)
    layer = activation_bytes(student, data.largest, layout)
    inputs = data.largest * student.hidden * (2 if student.weight_bytes == 2 else 4)
    kept = inputs if layout.checkpointing else layer
    found["activations"] = (
        student.layers * kept + 3 * inputs + _kept_by_losses(student, teachers, data, losses)
    )
    found["for a moment"] = _moment(student, teachers, data, losses, layout, layer, found["gradients"])
    found[PROGRAM] = _PROGRAM_BYTES
    return {cause: size for cause, size in found.items() if size}


def activation_bytes(model: ModelSize, tokens: int, layout: Layout) -> float:
    """What the backward pass of one decoder layer needs, attention not materialised and no dropout."""
    hidden, width = model.hidden, layout.width(model)
    normed = int(not model.adapted)  # needed by the gradient of a norm's weight alone
    if layout.precision(model) == "32":
        norms = 2 * 4 * hidden * (2 + normed if model.rms else 2)
    elif layout.precision(model) == "mixed":  # float32, and each reader casts for itself
        norms = 2 * 4 * hidden * (1 + normed if model.rms else 1) + 2 * hidden * model.readers
    else:  # an RMS norm computes in float32
        norms = 2 * hidden * (6 + 2 * normed if model.rms else 4)
    rest = 2 * (model.attention + model.keys) + model.kept * model.wide
    return float(tokens * (norms + width * rest))


def loss_bytes(
    student: ModelSize, teachers: Sequence[ModelSize], data: DataSize, losses: Losses, layout: Layout
) -> float:
    """Of the vocabulary-sized tensors of a chunk."""
    vocabulary = max(model.vocabulary for model in (student, *teachers))
    compared, cpu = losses.kind != "sft", not layout.cuda
    chunk, copies = fused_chunk(
        vocabulary, losses.budget / 2**20, heads=losses.heads, compared=compared, cpu=cpu
    )
    rows = min(chunk, data.largest_responses)
    if layout.cuda:
        return 4.0 * copies * rows * vocabulary
    width = layout.width(student)
    tiles = _TILES[losses.kind] + (losses.heads if width == 2 else 0)
    return losses.heads * rows * vocabulary * width + tiles * min(_TILE_BYTES, 4 * rows * vocabulary)


def _kept_by_losses(
    student: ModelSize, teachers: Sequence[ModelSize], data: DataSize, losses: Losses
) -> float:
    """Gradients that the losses make in the forward pass, and the projectors' inputs."""
    rows = 4.0 * data.largest_responses
    head = 4.0 * student.vocabulary * student.hidden if student.trains_head else 0.0
    if losses.kind != "dual":
        return head + rows * student.hidden
    return head + rows * sum(3 * student.hidden + 2 * teacher.hidden for teacher in teachers)


def _moment(
    student: ModelSize,
    teachers: Sequence[ModelSize],
    data: DataSize,
    losses: Losses,
    layout: Layout,
    layer: float,
    gradients: float,
) -> float:
    """The most that is there beyond all that stays through the forward pass."""
    gathered = _GATHERED if layout.sharded else 0
    moments = [loss_bytes(student, teachers, data, losses, layout)]
    for teacher in () if layout.cached else teachers:
        passing = data.largest * layout.width(teacher) * (4 * teacher.hidden + 3 * teacher.wide)
        whole = gathered or int(layout.cuda and teacher.offloaded)
        moments.append(passing + whole * teacher.layer_bytes / teacher.layers)
    part = student.layer_bytes / student.layers
    moments.append(gathered * part)
    # Gradients are let go before the backward pass makes new ones.
    trained = part * (student.adapted * 4 / student.layer_bytes if student.adapted else 1)
    short = 2.0 if layout.precision(student) == "mixed" else 0.0
    again = layer + short * student.layered / student.layers if layout.checkpointing else 0.0
    sent = _GRADIENTS * trained if layout.sharded else 0.0
    moments.append(gathered * part + sent + again - (gradients if layout.sharded else 0))
    moments.append(gradients if layout.cuda else 0.0)  # one kernel steps all weights
    return max(moments)
