"""Dual-space distillation across vocabularies by cross-model attention (arXiv 2406.17328)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from dskd_lightning.alignment.cross_model_attention import AttentionMap, CrossModelAttention
from dskd_lightning.alignment.key_query_matching import KeyQueryMatching
from dskd_lightning.errors import UserError
from dskd_lightning.functional import Divergence, ForwardKL, token_argmax
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.objectives._dual_space import SpaceWeights, student_space, teacher_space
from dskd_lightning.objectives._vocabulary import mutual_tokens
from dskd_lightning.objectives.base import ObjectiveOutput
from dskd_lightning.objectives.cross_tokenizer import CrossTokenizerObjective
from dskd_lightning.projection import LinearProjector
from dskd_lightning.structures import Alignment, ModelSpace, Ratio, Side

__all__ = ["DSKDCrossAttentionObjective"]


class DSKDCrossAttentionObjective(CrossTokenizerObjective):
    """DSKD whose two sides meet by cross-model attention, with or without key-query matching.

    ``KD = t2s_ce + t2s_kd + s2t_kd (+ kq_ratio * kq)``: the attended and projected teacher learns
    the gold labels through the student's frozen head (``t2s_ce``), the student follows it where
    its argmax is the gold label (``t2s_kd``), and the attended and projected student follows the
    teacher through the teacher's head at all of the teacher's positions (``s2t_kd``, forward KL).
    On the student's own samples the teacher's choice stands in the place of labels: in the values, and for
    the projected teacher at exact pairs, where it is known which of the student's tokens that is.

    Args:
        divergence: in the student's space; forward KL by default.
        attention: the aligner; `CrossModelAttention` as published but for its statistics.
        matching: draws queries towards keys (arXiv 2603.22056); None leaves them alone.
        kq_ratio: weight of ``matching`` within KD.
        initialization: ``random`` as published, or ``heads``: both projectors start, without bias, as the
            least-squares maps between the two heads (those of DSKD v2, over the tokens that both
            vocabularies hold), and the teacher's hidden states keep their scale.
        label_embedding: add the embedding of the token to predict to what the teacher's positions give,
            as published; False leaves it out, so that ``t2s_ce`` can't be read off the label.
        scale_inputs: the projectors read dimensions of unit root mean square, so that one learning
            rate holds for every model; False as published, see `LinearProjector`.
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        temperature: divides both sides' logits in the divergences.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        attention: CrossModelAttention | None = None,
        matching: KeyQueryMatching | None = None,
        kq_ratio: float = 0.1,
        initialization: Literal["random", "heads"] = "random",
        label_embedding: bool = True,
        scale_inputs: bool = True,
        kd_ratio: float = 0.5,
        temperature: float = 2.0,
        memory_budget_mb: float = DEFAULT_BUDGET_MB,
    ) -> None:
        super().__init__(kd_ratio, temperature, memory_budget_mb)
        if kq_ratio < 0:
            raise UserError(
                f"kq_ratio of DSKDCrossAttentionObjective must not be negative, but is {kq_ratio}."
            )
        if initialization not in ("random", "heads"):
            raise UserError(
                f"initialization of DSKDCrossAttentionObjective must be 'random' or 'heads', not "
                f"{initialization!r}."
            )
        self.initialization = initialization
        self.needs_vocabulary_map = initialization == "heads"
        self.label_embedding = label_embedding
        self.scale_inputs = scale_inputs
        self.divergence = ForwardKL() if divergence is None else divergence
        self.attention = CrossModelAttention() if attention is None else attention
        self.matching = matching
        self.kq_ratio = kq_ratio
        self.needs_padded_statistics = self.attention.needs_padded_statistics
        self.t2s: LinearProjector
        self.s2t: LinearProjector

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        super().configure(student, teacher)
        assert teacher is not None
        if self.label_embedding and teacher.embeddings.shape[1] != teacher.hidden_size:
            raise UserError(
                "Cross-model attention adds the teacher's token embeddings to its hidden states: this "
                f"teacher's sizes differ ({teacher.embeddings.shape[1]} and {teacher.hidden_size}); "
                "set label_embedding to false or take another objective."
            )
        self.attention.configure(student, teacher)
        ours, theirs = self._shared_tokens()
        for name, source, target, left, right in (
            ("t2s", teacher, student, theirs, ours),
            ("s2t", student, teacher, ours, theirs),
        ):
            if self.initialization == "heads":
                projector = LinearProjector.between_heads(
                    source.head, target.head, left, right, scale_inputs=self.scale_inputs
                )
            else:
                projector = LinearProjector(
                    source.hidden_size, target.hidden_size, scale_inputs=self.scale_inputs
                )
            setattr(self, name, projector)
        if self.matching is not None:
            self.matching.configure(2 * teacher.embeddings.shape[1])

    def _shared_tokens(self) -> tuple[Tensor, Tensor]:
        """Ids of the tokens that both vocabularies hold, in the student's and in the teacher's."""
        if self.student_to_teacher is None or self.teacher_to_student is None:
            return torch.empty(0), torch.empty(0)
        shared = mutual_tokens(self.student_to_teacher, self.teacher_to_student)
        return shared, self.student_to_teacher[shared]

    def projector_parameters(self, student: int, teacher: int) -> int:
        query = 4 * student * teacher + 2 * teacher
        biases = student + teacher if self.initialization == "random" else 0
        return 2 * student * teacher + biases + query

    def forward(
        self, student: Side, teacher: Side | None = None, alignment: Alignment | None = None
    ) -> ObjectiveOutput:
        assert teacher is not None
        if alignment is None and torch.equal(student.labels, teacher.labels):
            alignment = self._alignment(student, teacher, None)
        attention: AttentionMap = self.attention(student, teacher, alignment)
        labels, choosing = student.labels, teacher
        if student.sampled:
            choosing = replace(teacher, labels=token_argmax(teacher.hidden, teacher.head))
            labels = self._choices(student, choosing, alignment)
        values = self.t2s(
            self.attention.teacher_values(choosing, self.label_embedding, self.initialization == "heads")
        )
        reads, ratio = attention.student_reads, self.kd_share(student)
        loss, stats = student_space(
            student,
            attention.to_student(values),
            labels.masked_fill(~reads, -1),
            self.divergence,
            self.temperature,
            SpaceWeights(1 - ratio, ratio, ratio),
            memory_budget_mb=self.memory_budget_mb,
        )
        answers = attention.teacher_reads  # what reads nothing has no projected student
        s2t_loss, s2t_stats = teacher_space(
            teacher,
            attention.to_teacher(self.s2t(student.hidden)),
            ForwardKL(),
            self.temperature,
            ratio,
            memory_budget_mb=self.memory_budget_mb,
            kept=answers if self.attention.causal else None,
        )
        loss = loss + s2t_loss
        terms = {name: stats.pop(name) for name in ("ce", "t2s_ce", "t2s_kd")}
        terms["s2t_kd"] = s2t_stats.pop("s2t_kd")
        terms["kd"] = terms["t2s_ce"] + terms["t2s_kd"] + terms["s2t_kd"]
        metrics = self._metrics(student, answers, attention, alignment, reads, stats | s2t_stats)
        if self.matching is not None:
            kq, extra = self.matching(attention)
            loss = loss + ratio * self.kq_ratio * kq
            terms["kq"] = kq.detach()
            terms["kd"] = terms["kd"] + self.kq_ratio * terms["kq"]
            for name, (total, count) in extra.items():
                metrics[name] = Ratio(total, student.labels.new_full((), count))
        metrics |= self._agreement(stats, s2t_stats, answers, alignment)
        tokens = student.labels.new_full((), len(student))
        return ObjectiveOutput(loss, tokens, {k: Ratio(v, tokens) for k, v in terms.items()}, metrics)

    def _choices(self, student: Side, teacher: Side, alignment: Alignment | None) -> Tensor:
        """``[n]``: at exact pairs the student's token for the teacher's label, elsewhere -1."""
        labels = torch.full_like(student.labels, -1)
        if alignment is not None and self.teacher_to_student is not None:
            i, j = alignment.pairs.unbind(1)
            labels[i] = self.teacher_to_student[teacher.labels[j]]
        return labels

    def _metrics(
        self,
        student: Side,
        answers: Tensor,
        attention: AttentionMap,
        alignment: Alignment | None,
        reads: Tensor,
        stats: dict[str, Tensor],
    ) -> dict[str, Ratio]:
        tokens = student.labels.new_full((), len(student))
        metrics = self.alignment_metrics(student, alignment, reads)
        metrics["student_accuracy"] = Ratio((stats["student_choice"] == student.labels).sum(), tokens)
        metrics["student_entropy"] = Ratio(stats["student_entropy"], tokens)
        for name in ("t2s_accuracy", "max_t2s_prob"):
            metrics[name] = Ratio(stats[name], reads.sum())
        for name in ("s2t_accuracy", "teacher_accuracy"):
            metrics[name] = Ratio(stats[name], answers.sum())
        metrics["teacher_entropy"] = Ratio(stats["teacher_entropy"], tokens.new_full((), len(answers)))
        if alignment is not None:
            mass = attention.pair_mass(alignment.pairs)
            metrics["partner_attention"] = Ratio(mass.sum(), tokens.new_full((), len(mass)))
        return metrics

    def _agreement(
        self,
        stats: dict[str, Tensor],
        s2t_stats: dict[str, Tensor],
        answers: Tensor,
        alignment: Alignment | None,
    ) -> dict[str, Ratio]:
        """Shares of exact pairs at which two of the choices name the same token.

        ``agreement``: student and teacher; ``t2s_agreement``: the teacher, projected and read by the
        student's head, and the teacher itself; ``s2t_agreement``: likewise for the student.
        """
        if alignment is None or self.teacher_to_student is None or self.student_to_teacher is None:
            return {}
        i, j = alignment.pairs.unbind(1)
        read = answers[j]  # a causal teacher position may read nothing and has no choice here
        student, teacher = stats["student_choice"][i], s2t_stats["teacher_choice"][j]
        wanted = self.teacher_to_student[teacher]
        shares = {
            "agreement": student == wanted,
            "t2s_agreement": stats["t2s_choice"][i] == wanted,
            "s2t_agreement": s2t_stats["s2t_choice"][j] == self.student_to_teacher[student],
        }
        return {name: Ratio((same & read).sum(), read.sum()) for name, same in shares.items()}
