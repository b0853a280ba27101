"""The one interface that every objective has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from dskd_lightning.structures import Alignment, ModelSpace, Ratio, Side

__all__ = ["Objective", "ObjectiveOutput"]


@dataclass(frozen=True)
class ObjectiveOutput:
    """Sums over the response tokens of one batch.

    Args:
        loss: scalar with a gradient, a **sum** over the student's response tokens. Divide it by
            the number of student response tokens of the whole optimiser step.
        tokens: scalar, the number of student response tokens of this batch.
        terms: parts of the loss, each counted over ``tokens``, detached.
        metrics: diagnostics with counts of their own, detached.
    """

    loss: Tensor
    tokens: Tensor
    terms: dict[str, Ratio] = field(default_factory=dict)
    metrics: dict[str, Ratio] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """What is minimised. Knows nothing of Lightning, of datasets or of model classes.

    A subclass is built from its own hyperparameters alone (so that a config can name it),
    learns the models' sizes in :meth:`configure`, where it makes its trainable parameters, and
    is then called on every batch.
    """

    needs_teacher: bool = True
    """False for an objective that reads the gold responses only."""
    needs_alignment: bool = False
    """True where the two tokenisations' byte alignment is read."""
    needs_padded_statistics: bool = False
    """True where `Side.padded` is read."""
    same_vocabulary: bool = False
    """True where student and teacher must read the same token ids."""

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        """Make the parameters that depend on the two models; called once, before training.

        Raises:
            UserError: the two models cannot be used together with this objective.
        """

    @abstractmethod
    def forward(
        self, student: Side, teacher: Side | None = None, alignment: Alignment | None = None
    ) -> ObjectiveOutput:
        """The loss of one batch; ``alignment`` is None where both sides read the same ids."""
