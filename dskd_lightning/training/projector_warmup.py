"""Steps at the beginning in which the objectives' own parameters learn, and the student doesn't."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dskd_lightning.errors import UserError
from dskd_lightning.training.length import total_steps

__all__ = ["check_warmup", "forget_gradients", "touched"]


def check_warmup(steps: int, trainer: L.Trainer | None, optimizer: Optimizer) -> None:
    """Check that there is something to warm up, and something left to train.

    Raises:
        UserError: there isn't.
    """
    if not steps:
        return
    if trainer is None:
        raise UserError("model.projector_warmup_steps: a Trainer counts them; without one, set it to 0.")
    names = [str(group.get("name")) for group in optimizer.param_groups]
    if not any(name.startswith("projector") for name in names):
        raise UserError(
            "model.projector_warmup_steps: the objective has no projector or other part that learns; set it "
            "to 0."
        )
    total = total_steps(trainer)
    if 0 <= total <= steps:
        raise UserError(
            f"model.projector_warmup_steps: {steps} of {total:.0f} steps leave none for the student; lower "
            "it, or train longer."
        )


def touched(loss: Tensor, student: nn.Module) -> Tensor:
    """The same loss, with a gradient of 0 to every weight: DistributedDataParallel waits for each."""
    ends = [p.flatten()[:1].sum() for p in student.parameters() if p.requires_grad]
    return loss + 0.0 * torch.stack(ends).sum() if ends else loss


def forget_gradients(student: nn.Module) -> None:
    """Leave the optimiser nothing of the student, so that neither moments nor decay begin."""
    for parameter in student.parameters():
        parameter.grad = None
