"""Dual-space knowledge distillation over one shared vocabulary (arXiv 2406.17328).

Every dual-space objective is two passes, :func:`student_space` and :func:`teacher_space` of
`objectives._dual_space`, on rows that correspond. They differ in how rows come to correspond
(here: position ``i`` with position ``i``; across vocabularies by attention or by bytes), in the
projectors, and in the labels of the projected teacher.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.functional import Divergence, ForwardKL
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.objectives._dual_space import SpaceWeights, student_space, teacher_space
from dskd_lightning.objectives._same_vocabulary import SameVocabularyObjective, ratios
from dskd_lightning.objectives.base import ObjectiveOutput
from dskd_lightning.projection import LinearProjector
from dskd_lightning.structures import Alignment, ModelSpace, Side

__all__ = ["DSKDObjective"]


class DSKDObjective(SameVocabularyObjective):
    """DSKD: teacher and student compared in each other's space, each through its own head.

    ``KD = t2s_ce + t2s_kd + s2t_kd``. In the student's space the projected teacher learns the gold
    labels through the student's head, held still (``t2s_ce``), and the student follows it
    (``t2s_kd``). In the teacher's space the projected student follows the teacher by forward KL
    (``s2t_kd``). All three are sums over the response tokens. On the student's own samples the projected
    teacher learns what the teacher would have chosen.

    Args:
        divergence: in the student's space; forward KL by default.
        initialization: ``random`` as published, or ``heads``: both projectors start, without bias,
            as the least-squares maps between the two heads of DSKD v2, so that the projected
            hidden states mean something from the first step on.
        scale_inputs: the projectors read dimensions of unit root mean square, so that one learning
            rate holds for every model; False as published, see `LinearProjector`.
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        temperature: divides both sides' logits in the divergences.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.

    Attributes:
        t2s: projector from the teacher's hidden states to the student's space.
        s2t: projector from the student's hidden states to the teacher's space.
    """

    t2s: LinearProjector
    s2t: LinearProjector

    def __init__(
        self,
        divergence: Divergence | None = None,
        initialization: Literal["random", "heads"] = "random",
        scale_inputs: bool = True,
        kd_ratio: float = 0.5,
        temperature: float = 2.0,
        memory_budget_mb: float = DEFAULT_BUDGET_MB,
    ) -> None:
        super().__init__(divergence, kd_ratio, temperature, memory_budget_mb)
        if initialization not in ("random", "heads"):
            raise UserError(
                f"initialization of DSKDObjective must be 'random' or 'heads', not {initialization!r}."
            )
        self.initialization = initialization
        self.scale_inputs = scale_inputs

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        super().configure(student, teacher)
        assert teacher is not None
        shared = slice(min(student.vocab_size, teacher.vocab_size))
        for name, source, target in (("t2s", teacher, student), ("s2t", student, teacher)):
            if self.initialization == "heads":
                projector = LinearProjector.between_heads(
                    source.head, target.head, shared, shared, scale_inputs=self.scale_inputs
                )
            else:
                projector = LinearProjector(
                    source.hidden_size, target.hidden_size, scale_inputs=self.scale_inputs
                )
            setattr(self, name, projector.to(student.head.weight.device))

    def projector_parameters(self, student: int, teacher: int) -> int:
        biases = student + teacher if self.initialization == "random" else 0
        return 2 * student * teacher + biases

    def forward(
        self, student: Side, teacher: Side | None = None, alignment: Alignment | None = None
    ) -> ObjectiveOutput:
        teacher = self._pair(student, teacher)
        ratio = self.kd_share(student)
        s2t_loss, s2t = teacher_space(
            teacher,
            self.s2t(student.hidden),
            ForwardKL(),
            self.temperature,
            ratio,
            memory_budget_mb=self.memory_budget_mb,
        )
        labels = student.labels
        if student.sampled:  # the teacher's choice in their place, as in DSKD v2
            choice = s2t["teacher_choice"]
            labels = choice.masked_fill(choice >= student.head.vocab_size, -1)
        t2s_loss, t2s = student_space(
            student,
            self.t2s(teacher.hidden.detach()),
            labels,
            self.divergence,
            self.temperature,
            SpaceWeights(1 - ratio, ratio, ratio),
            memory_budget_mb=self.memory_budget_mb,
            only_agreeing=False,
        )
        return dual_space_output(student, t2s_loss + s2t_loss, t2s, s2t)


def dual_space_output(
    student: Side, loss: Tensor, t2s: dict[str, Tensor], s2t: dict[str, Tensor]
) -> ObjectiveOutput:
    """Terms and diagnostics of two passes whose rows are the student's positions.

    ``t2s_agreement`` and ``s2t_agreement`` are the shares of positions at which a model's hidden
    states, projected and read by the other's head, choose as the model itself does.
    """
    tokens = student.labels.new_full((), len(student))
    terms = {"ce": t2s["ce"], "t2s_ce": t2s["t2s_ce"], "t2s_kd": t2s["t2s_kd"], "s2t_kd": s2t["s2t_kd"]}
    terms["kd"] = terms["t2s_ce"] + terms["t2s_kd"] + terms["s2t_kd"]
    gold, choice = student.labels, s2t["teacher_choice"]
    metrics = {
        "student_accuracy": (t2s["student_choice"] == gold).sum(),
        "agreement": (t2s["student_choice"] == choice).sum(),
        "t2s_accuracy": (t2s["t2s_choice"] == gold).sum(),
        "t2s_agreement": (t2s["t2s_choice"] == choice).sum(),
        "s2t_agreement": (s2t["s2t_choice"] == t2s["student_choice"]).sum(),
        "student_entropy": t2s["student_entropy"],
    }
    for name in ("s2t_accuracy", "teacher_accuracy", "teacher_entropy"):
        metrics[name] = s2t[name]
    return ObjectiveOutput(loss, tokens, ratios(terms, tokens), ratios(metrics, tokens))
