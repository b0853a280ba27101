"""Optimiser parameter groups and the default learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["cosine_with_warmup", "follow_schedule", "parameter_groups"]


def parameter_groups(
    student: nn.Module, objectives: nn.Module, projector_lr: float | None, lr: float | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups, named ``student`` and ``projector``.

    Vectors (norms, biases) take no weight decay, as usual for transformers.

    Args:
        student: the student model.
        objectives: modules whose parameters (projectors, critics) train beside it.
        projector_lr: their learning rate; None takes the student's.
        lr: the student's learning rate; None takes the optimiser's.
    """

    def split(name: str, parameters: Iterable[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
        trainable = [p for p in parameters if p.requires_grad]
        matrices = [p for p in trainable if p.ndim >= 2]
        vectors = [p for p in trainable if p.ndim < 2]
        groups = [
            {"name": name, "params": matrices, **options},
            {"name": f"{name}_no_decay", "params": vectors, "weight_decay": 0.0, **options},
        ]
        return [group for group in groups if group["params"]]

    own = {} if lr is None else {"lr": lr}
    other = own if projector_lr is None else {"lr": projector_lr}
    return split("student", student.parameters(), **own) + split(
        "projector", objectives.parameters(), **other
    )


def cosine_with_warmup(
    optimizer: Optimizer,
    total_steps: int,
    warmup_ratio: float = 0.1,
    min_lr_ratio: float = 0.0,
    student_starts: int = 0,
) -> LambdaLR:
    """Linear warm-up over ``warmup_ratio`` of the steps, then a cosine to ``min_lr_ratio``.

    The first step already has a learning rate above zero, the last one ``min_lr_ratio`` of the peak.

    Args:
        optimizer: with groups of `parameter_groups`.
        total_steps: of the training.
        warmup_ratio: share of a group's steps.
        min_lr_ratio: last learning rate over the peak.
        student_starts: step at which the student's schedule begins; its rate is 0 before that.
    """

    def factor(step: int, begin: int) -> float:
        step, steps = step - begin, total_steps - begin
        warmup = round(steps * warmup_ratio)
        if step < 0:
            return 0.0
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    begins = [
        student_starts if str(group.get("name")).startswith("student") else 0
        for group in optimizer.param_groups
    ]
    return LambdaLR(optimizer, [partial(factor, begin=begin) for begin in begins])


def follow_schedule(scheduler: LambdaLR) -> None:
    """Set the rates of the scheduler's present step; a checkpoint holds those of a schedule that may
    have ended elsewhere."""
    scheduler._last_lr = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
