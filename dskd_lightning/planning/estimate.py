"""Rules of thumb for the memory and the time of a run, from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dskd_lightning.planning.machine import Machine
from dskd_lightning.planning.sizes import ModelSize

__all__ = ["Estimate", "estimate"]

_BASE_BYTES = 1.2e9
"""Python, torch and its kernels."""
_ACTIVATION_BYTES = 34
"""Of 16-bit activations per token, layer and hidden unit, attention not materialised (arXiv 2205.05198)."""
_REACHED = 0.35
"""Share of a large product's speed that training reaches."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by cause, and seconds.

    Args:
        memory: cause -> bytes.
        seconds: of the whole fit.
        steps: optimiser steps.
    """

    memory: dict[str, float]
    seconds: float
    steps: int

    @property
    def bytes(self) -> float:
        """All of the memory."""
        return sum(self.memory.values())


def estimate(
    student: ModelSize,
    teachers: Sequence[ModelSize],
    machine: Machine,
    *,
    sequences: int,
    tokens: int,
    batch: int,
    longest: int,
    accumulate: int = 1,
    epochs: float = 1,
    mixed: bool = True,
    checkpointing: bool = False,
    cached: bool = False,
    state_bytes: float = 8,
    budget: float = 2**30,
) -> Estimate:
    """Memory and time of a fit, within a factor of two where nothing is unusual.

    Args:
        student: its sizes.
        teachers: theirs.
        machine: the device.
        sequences: of an epoch.
        tokens: student tokens of an epoch.
        batch: sequences of a micro-batch.
        longest: tokens of its longest sequence.
        accumulate: micro-batches of an optimiser step.
        epochs: passes over the data.
        mixed: whether products run in 16 bits.
        checkpointing: whether activations are computed again in the backward pass.
        cached: whether the teachers' states come from disk; each then reads the data once.
        state_bytes: of the optimizer for each trained weight.
        budget: bytes of the losses' vocabulary-sized tensors.
    """
    width = 2 if mixed or student.weight_bytes == 2 else 4
    each = batch * longest * student.hidden * _ACTIVATION_BYTES * width / 2
    kept = batch * longest * student.hidden * width * student.layers
    activations = kept + each if checkpointing else each * student.layers
    memory = {
        "student's weights": student.parameters * student.weight_bytes,
        "gradients and optimizer": student.trained * (max(student.weight_bytes, 2) + state_bytes),
        "activations": activations,
        "losses": budget,
        "program": _BASE_BYTES,
    }
    whole = [t.parameters * t.weight_bytes for t in teachers]
    heads = [t.vocabulary * t.hidden * min(t.weight_bytes, 4) for t in teachers]
    if teachers:
        # While a cache is built the teachers are whole, but nothing trains yet.
        memory["teacher's weights"] = sum(heads) if cached else sum(whole)
    if mixed and student.weight_bytes == 4:
        memory["weights in 16 bits"] = student.parameters * 2.0
    backward = 4 * student.parameters if student.trained < student.parameters / 2 else 6 * student.parameters
    repeated = 2 * student.parameters if checkpointing else 0
    work = tokens * epochs * (backward + repeated)
    for teacher in teachers:
        head = 2 * teacher.vocabulary * teacher.hidden
        work += tokens * (
            2 * teacher.parameters + epochs * head if cached else epochs * 2 * teacher.parameters
        )
    steps = max(1, round(epochs * sequences / max(1, batch * accumulate)))
    return Estimate(memory, work / (machine.speed(mixed or student.weight_bytes == 2) * _REACHED), steps)
