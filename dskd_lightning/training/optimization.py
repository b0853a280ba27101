"""Optimiser parameter groups and the default learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning as L
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dskd_lightning.errors import UserError

__all__ = [
    "check_clipping",
    "check_rates",
    "cosine_with_warmup",
    "follow_schedule",
    "made_optimizer",
    "parameter_groups",
]


def check_rates(projector_lr: float | None, warmup_ratio: float, min_lr_ratio: float) -> None:
    """Refuse rates with which training would climb, or never begin.

    Raises:
        UserError: a rate is negative, or a share isn't between 0 and 1.
    """
    if projector_lr is not None and not 0 <= projector_lr < math.inf:
        raise UserError(
            f"model.projector_lr: {projector_lr} must be a number of at least 0; null takes the student's."
        )
    for name, share in (("warmup_ratio", warmup_ratio), ("min_lr_ratio", min_lr_ratio)):
        if not 0 <= share <= 1:
            raise UserError(f"model.{name}: {share} must lie between 0 and 1.")


def check_clipping(trainer: L.Trainer | None) -> None:
    """Refuse a bound of gradients below zero, which would turn them round.

    Raises:
        UserError: it is negative.
    """
    bound = None if trainer is None else trainer.gradient_clip_val
    if bound is not None and not bound >= 0:
        raise UserError(
            f"trainer.gradient_clip_val: {bound} must be at least 0; null or 0 leaves gradients as they are."
        )


def made_optimizer(make: Callable[[Any], Optimizer], groups: list[dict[str, Any]]) -> Optimizer:
    """The optimiser of these groups.

    Raises:
        UserError: it refuses its settings.
    """
    try:
        return make(groups)
    except ValueError as error:
        raise UserError(f"model.optimizer: {str(error).rstrip('.')}.") from error


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
