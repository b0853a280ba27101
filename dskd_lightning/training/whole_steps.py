"""One mean over all response tokens of an optimiser step, for training loops and modules of any kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dskd_lightning.errors import UserError
from dskd_lightning.projection.settling import Settling
from dskd_lightning.ranks import sum_over_ranks
from dskd_lightning.structures import DistillationBatch
from dskd_lightning.training.windows import look_ahead

__all__ = ["WholeSteps", "mean_over_step", "measure_whole_steps", "settle", "settle_before_steps"]


def mean_over_step(
    total: Tensor, batch: DistillationBatch, within: L.LightningModule | L.Fabric | None = None
) -> Tensor:
    """Make a sum over this batch's response tokens its part of the mean over the optimiser step.

    Lightning divides by the accumulated batches and data parallelism by the ranks; both are made up
    for. Without a Trainer or Fabric the parts of a step simply add up.

    Args:
        total: scalar with a gradient.
        batch: with ``step_tokens`` where the step has more batches, see `WholeSteps` and
            `dskd_lightning.training.windows`.
        within: the module that trains, or the Fabric; None on one process without either.

    Raises:
        UserError: the Trainer accumulates batches whose step nobody looked ahead at.
    """
    fabric = within._fabric if isinstance(within, L.LightningModule) else within
    trainer = within._trainer if isinstance(within, L.LightningModule) else None
    tokens = batch.step_tokens
    if tokens is None:  # made without a copy from the host
        tokens = total.new_full((), batch.student.response.numel(), dtype=torch.long)
    world, accumulated = 1, 1
    if fabric is not None:
        world = fabric.world_size
    elif trainer is not None:
        if batch.step_tokens is None and trainer.accumulate_grad_batches > 1:
            raise UserError(
                "trainer.accumulate_grad_batches: the batches of a step can't be looked at ahead; give "
                "one training loader of DistillationBatches, or larger batches instead."
            )
        world, accumulated = trainer.world_size, trainer.accumulate_grad_batches
    if world > 1:
        tokens = sum_over_ranks(tokens.to(total.device, copy=True))
    precise = torch.promote_types(total.dtype, torch.float32)
    return total * (world * accumulated / tokens.clamp(min=1).to(total.device, precise))


def measure_whole_steps(part: nn.Module) -> None:
    """Let projectors and a decaying prior wait for `settle`, however many batches and ranks it takes."""
    for settling in _settling(part):
        settling.measure_whole_step()


def settle(part: nn.Module) -> None:
    """Let them take in what they had, between a step's last backward and the optimiser's step."""
    for settling in _settling(part):
        settling.settle()


def _settling(part: nn.Module) -> Iterator[Settling]:
    return (module for module in part.modules() if isinstance(module, Settling))


def settle_before_steps(optimizer: Optimizer, part: nn.Module) -> None:
    """`measure_whole_steps`, and `settle` in front of each of the optimiser's steps: for plain loops."""
    measure_whole_steps(part)
    optimizer.register_step_pre_hook(lambda *_: settle(part))


class WholeSteps(L.Callback):
    """Makes steps exact in a LightningModule of one's own that holds an objective.

    Batches of `DistillationCollator` learn how many response tokens their whole step has, which
    `mean_over_step` reads, and projectors measure their input over a whole step. With both, accumulation and
    ranks change nothing. `DistillationModule` does this by itself.

    Args:
        objective: whose projectors are meant; None for those of the whole module.
    """

    def __init__(self, objective: nn.Module | None = None) -> None:
        self._objective = objective

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        measure_whole_steps(self._part(pl_module))
        look_ahead(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        look_ahead(trainer)  # loaders may be made anew for every epoch

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        settle(self._part(pl_module))

    def _part(self, module: L.LightningModule) -> nn.Module:
        return module if self._objective is None else self._objective
