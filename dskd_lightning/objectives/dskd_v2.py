"""DSKD v2 over one shared vocabulary (arXiv 2504.11426)."""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.functional import Divergence, token_argmax
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.objectives._dual_space import SpaceWeights, projector_alone, student_space, teacher_space
from dskd_lightning.objectives._same_vocabulary import SameVocabularyObjective
from dskd_lightning.objectives.base import ObjectiveOutput
from dskd_lightning.objectives.dskd import dual_space_output
from dskd_lightning.projection import HeadMap, LinearProjector
from dskd_lightning.structures import Alignment, ModelSpace, Side

__all__ = ["DSKDv2Objective"]


class DSKDv2Objective(SameVocabularyObjective):
    """DSKD with projectors made from the two heads, and the teacher's own choice as label.

    ``KD = t2s_ce + t2s_kd + s2t_kd``, where ``P_t2s`` is trained from ``T S^+``, ``P_s2t`` is
    ``S T^+`` of the present student head and not trained, and ``t2s_ce`` takes the teacher's
    argmax as label. ``S`` and ``T`` are the two heads' columns of the shared tokens.

    ``t2s_kd`` is the batch's mean over the positions where the projected teacher chooses as the
    teacher does, times the number of response tokens.

    Args:
        divergence: in both spaces; forward KL by default.
        agreement_threshold: above this share of agreeing positions, ``t2s_kd`` runs over all of them.
        topk_vocab: how many of the shared tokens, the first ones, make the projectors; None takes all.
        scale_inputs: the trained projector reads dimensions of unit root mean square, so that one
            learning rate holds for every teacher; False as published, see `LinearProjector`.
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        temperature: divides both sides' logits in the divergences.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.

    Attributes:
        t2s: projector from the teacher's hidden states to the student's space.
        s2t: map from the student's hidden states to the teacher's space; has no parameters.
    """

    keeps_teacher_head = True
    warms_up_alone = True
    t2s: LinearProjector
    s2t: HeadMap

    def __init__(
        self,
        divergence: Divergence | None = None,
        agreement_threshold: float = 1.0,
        topk_vocab: int | None = None,
        scale_inputs: bool = True,
        kd_ratio: float = 0.5,
        temperature: float = 2.0,
        memory_budget_mb: float = DEFAULT_BUDGET_MB,
    ) -> None:
        super().__init__(divergence, kd_ratio, temperature, memory_budget_mb)
        if not 0.0 <= agreement_threshold <= 1.0:
            raise UserError(
                f"agreement_threshold of DSKDv2Objective must lie in [0, 1], not {agreement_threshold}."
            )
        if topk_vocab is not None and topk_vocab < 1:
            raise UserError(
                f"topk_vocab of DSKDv2Objective must be at least 1, not {topk_vocab}; leave it out for all."
            )
        self.agreement_threshold = agreement_threshold
        self.topk_vocab = topk_vocab
        self.scale_inputs = scale_inputs

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        super().configure(student, teacher)
        assert teacher is not None
        shared = slice(min(student.vocab_size, teacher.vocab_size, self.topk_vocab or student.vocab_size))
        self.t2s = LinearProjector.between_heads(
            teacher.head, student.head, shared, shared, scale_inputs=self.scale_inputs
        )
        self.t2s.to(student.head.weight.device)
        self.s2t = HeadMap(teacher.head, shared, shared)

    def projector_parameters(self, student: int, teacher: int) -> int:
        return student * teacher

    def further_head_products(self) -> tuple[int, int]:
        return 1, 0  # where the projected teacher agrees

    def forward(
        self, student: Side, teacher: Side | None = None, alignment: Alignment | None = None
    ) -> ObjectiveOutput:
        teacher = self._pair(student, teacher)
        ratio, budget = self.kd_share(student), self.memory_budget_mb
        if not student.hidden.shape[1]:
            targets = _targets(token_argmax(teacher.hidden, teacher.head), student)
            return projector_alone(student, self.t2s(teacher.hidden.detach()), targets, ratio, budget)
        s2t_loss, s2t = teacher_space(
            teacher,
            self.s2t(student.hidden, student.head, teacher.head),
            self.divergence,
            self.temperature,
            ratio,
            memory_budget_mb=budget,
        )
        targets = _targets(s2t["teacher_choice"], student)
        projected = self.t2s(teacher.hidden.detach())
        t2s_loss, t2s = student_space(
            student,
            projected,
            targets,
            self.divergence,
            self.temperature,
            SpaceWeights(1 - ratio, ratio, ratio),
            memory_budget_mb=budget,
            only_agreeing=False,
            kd_mask=self._agreement(projected.detach(), student, targets),
        )
        return dual_space_output(student, t2s_loss + s2t_loss, t2s, s2t)

    def _agreement(self, projected: Tensor, student: Side, targets: Tensor) -> Tensor:
        """Factor ``[n]`` on each position's ``t2s_kd``: its share in the mean, times ``n``."""
        wide = torch.promote_types(projected.dtype, torch.float32)
        agree = torch.eq(token_argmax(projected, student.head), targets).to(wide)
        agreeing = agree.sum()
        averaged = agree * (len(student) / agreeing.clamp(min=1))
        return averaged.where(agreeing <= self.agreement_threshold * len(student), 1.0)


def _targets(choice: Tensor, student: Side) -> Tensor:
    """What the teacher chooses; -1 beyond the student's vocabulary, where it has no label."""
    return choice.masked_fill(choice >= student.head.vocab_size, -1)
