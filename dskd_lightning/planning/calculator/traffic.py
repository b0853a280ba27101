"""Bytes that one rank sends in an optimizer step, by collectives that send no byte twice (rings)."""

from __future__ import annotations

from collections.abc import Sequence

from dskd_lightning.planning.calculator.shapes import Layout, Losses, ModelSize

__all__ = ["traffic"]


def traffic(
    student: ModelSize, teachers: Sequence[ModelSize], losses: Losses, layout: Layout
) -> dict[str, float]:
    """Cause -> bytes; every rank receives as many. Empty on one rank."""
    gradients = student.trained_bytes + 4.0 * losses.projectors
    if not layout.sharded:
        found = {"gradients": 2 * _others(layout.ranks) * gradients}
    else:
        layers = 2 * student.layer_bytes  # forward and, since they aren't kept, backward
        outer = student.outer_bytes + 4.0 * losses.projectors
        for teacher in teachers:
            layers += 0 if layout.cached else teacher.layer_bytes
            outer += teacher.outer_bytes
        shards, often = layout.shards, layout.accumulate
        found = {
            "layers gathered": often * _others(shards) * layers,
            "embeddings and heads gathered": often * _others(shards) * outer,
            "gradients scattered": often * _others(shards) * gradients,
            "gradients between copies": often * 2 * _others(layout.replicas) * gradients / shards,
        }
    return {cause: size for cause, size in found.items() if size}


def _others(ranks: int) -> float:
    """Share that isn't a rank's own."""
    return (ranks - 1) / ranks
