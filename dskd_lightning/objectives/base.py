"""The one interface that every objective has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from dskd_lightning.described import Described
from dskd_lightning.errors import UserError
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.structures import Alignment, ModelSpace, Ratio, Side

__all__ = ["DistillationObjective", "Objective", "ObjectiveOutput"]


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


class Objective(Described, nn.Module, ABC):
    """What is minimised. Knows nothing of Lightning, of datasets or of model classes.

    A subclass is built from its own hyperparameters alone (so that a config can name it),
    learns the models' sizes in :meth:`configure`, where it makes its trainable parameters, and
    is then called on every batch.
    """

    needs_teacher: bool = True
    """False for an objective that reads the gold responses only."""
    needs_padded_statistics: bool = False
    """True where `Side.padded` is read."""
    keeps_teacher_head: bool = False
    """True where the teacher's head is read once, before training, and taken for what it is later."""
    learns_from_log_probabilities: bool = False
    """True where `Side.log_probs` is enough of a teacher."""
    learns_from_samples: bool = False
    """True where `Side.sampled` is heeded: the labels are then the student's own samples, and nothing to
    learn; only what the teacher says about them is."""
    warms_up_alone: bool = False
    """True where a student that hasn't run, with hidden states ``[n, 0]``, is enough for what the
    objective's own parameters learn from."""

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        """Make the parameters that depend on the two models; called once, before training.

        Raises:
            UserError: the two models cannot be used together with this objective.
        """

    def projector_parameters(self, student: int, teacher: int) -> int:
        """How many parameters `configure` makes for models of these hidden sizes; for plans of memory."""
        return 0

    def further_head_products(self) -> tuple[int, int]:
        """Matrix products of a response token with the student's and with the teacher's head beyond those
        of the losses in each space, such as for a choice that is read in front of them; for plans of time."""
        return 0, 0

    @abstractmethod
    def forward(
        self, student: Side, teacher: Side | None = None, alignment: Alignment | None = None
    ) -> ObjectiveOutput:
        """The loss of one batch; ``alignment`` is None where both sides read the same ids."""


class DistillationObjective(Objective):
    """Base of objectives that weigh cross-entropy against a term that a teacher gives.

    Args:
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``; cross-entropy runs on all of the
            student's response tokens.
        temperature: divides both sides' logits in KD.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.

    Raises:
        UserError: a value is out of range.
    """

    learns_from_samples = True

    def __init__(
        self, kd_ratio: float = 0.5, temperature: float = 2.0, memory_budget_mb: float = DEFAULT_BUDGET_MB
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not 0.0 <= kd_ratio <= 1.0:
            raise UserError(f"kd_ratio of {name} must lie in [0, 1], not {kd_ratio}.")
        if temperature <= 0.0:
            raise UserError(f"temperature of {name} must be positive, not {temperature}.")
        if memory_budget_mb <= 0.0:
            raise UserError(f"memory_budget_mb of {name} must be positive, not {memory_budget_mb}.")
        self.kd_ratio = kd_ratio
        self.temperature = temperature
        self.memory_budget_mb = memory_budget_mb

    def kd_share(self, student: Side) -> float:
        """Weight of KD in the loss: ``kd_ratio``, or 1 on the student's own samples."""
        return 1.0 if student.sampled else self.kd_ratio

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        """See `Objective.configure`.

        Raises:
            UserError: there is no teacher.
        """
        if teacher is None:
            raise UserError(f"{type(self).__name__} learns from a teacher: name one under model.teacher.")
