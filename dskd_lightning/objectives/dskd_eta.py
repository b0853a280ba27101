"""DSKD v2 across vocabularies by exact token alignment (arXiv 2504.11426)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.functional import Divergence, ForwardKL, token_argmax
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.functional.paired_logits import paired_logit_sum
from dskd_lightning.objectives._dual_space import SpaceWeights, projector_alone, student_space, teacher_space
from dskd_lightning.objectives._vocabulary import mutual_tokens
from dskd_lightning.objectives.base import ObjectiveOutput
from dskd_lightning.objectives.cross_tokenizer import CrossTokenizerObjective
from dskd_lightning.projection import HeadMap, LinearProjector
from dskd_lightning.structures import Alignment, Head, ModelSpace, Ratio, Side

__all__ = ["DSKDTokenAlignmentObjective"]


class DSKDTokenAlignmentObjective(CrossTokenizerObjective):
    """DSKD v2 on positions that have read the same text: published, those whose tokens cover the same bytes.

    ``KD = t2s_ce + t2s_kd + s2t_kd``, each a mean over pairs. The projected teacher's label is the
    teacher's argmax, mapped to the student's vocabulary; a pair whose label has no counterpart is
    dropped. ``P_t2s`` is trained from ``T S^+``, ``P_s2t`` is ``S T^+`` of the present student
    head and never trained, ``S`` and ``T`` being the heads' columns of the shared tokens.

    The mean over pairs is returned as a sum over the student's tokens: times ``tokens / pairs`` of
    the batch, since `ObjectiveOutput.tokens` counts all response tokens, on which cross-entropy
    runs. A micro-batch with few pairs thus weighs as much per token as one with many.

    Args:
        divergence: in both spaces; forward KL by default.
        agreement_threshold: where the projected teacher's argmax is the label at no more than this
            share of pairs, ``t2s_kd`` is the mean over those pairs; otherwise over all.
        topk_vocab: shared tokens that initialise the projectors, the first of them; None takes all.
        positions: ``pairs`` are exact pairs, as published; ``boundaries`` also takes every other byte at
            which tokens of both end: the two have read the same text there, though their next tokens differ.
        projector_learns: the teacher's ``choice``, as published, or its whole ``distribution`` over the
            shared tokens at every pair: ``t2s_ce`` is then ``-sum p log q``. A choice says little of
            thousands of dimensions, and a projector learns that of few examples by heart.
        scale_inputs: the trained projector reads dimensions of unit root mean square, so that one
            learning rate holds for every teacher; False as published, see `LinearProjector`.
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        temperature: divides both sides' logits in the divergences.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.
    """

    warms_up_alone = True
    t2s: LinearProjector
    s2t: HeadMap
    student_ids: Tensor
    teacher_ids: Tensor

    def __init__(
        self,
        divergence: Divergence | None = None,
        agreement_threshold: float = 1.0,
        topk_vocab: int | None = None,
        positions: Literal["pairs", "boundaries"] = "pairs",
        projector_learns: Literal["choice", "distribution"] = "choice",
        scale_inputs: bool = True,
        kd_ratio: float = 0.5,
        temperature: float = 2.0,
        memory_budget_mb: float = DEFAULT_BUDGET_MB,
    ) -> None:
        super().__init__(kd_ratio, temperature, memory_budget_mb)
        if not 0.0 <= agreement_threshold <= 1.0:
            raise UserError(
                f"agreement_threshold of DSKDTokenAlignmentObjective must lie in [0, 1], "
                f"not {agreement_threshold}."
            )
        if topk_vocab is not None and topk_vocab < 1:
            raise UserError(
                f"topk_vocab of DSKDTokenAlignmentObjective must be at least 1, not {topk_vocab}; "
                "leave it out to take all shared tokens."
            )
        self.divergence = ForwardKL() if divergence is None else divergence
        self.agreement_threshold = agreement_threshold
        if positions not in ("pairs", "boundaries"):
            raise UserError(
                f"positions of DSKDTokenAlignmentObjective must be 'pairs' or 'boundaries', not "
                f"{positions!r}."
            )
        if projector_learns not in ("choice", "distribution"):
            raise UserError(
                "projector_learns of DSKDTokenAlignmentObjective must be 'choice' or 'distribution', not "
                f"{projector_learns!r}."
            )
        self.topk_vocab, self.positions = topk_vocab, positions
        self.projector_learns = projector_learns
        self.scale_inputs = scale_inputs

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        super().configure(student, teacher)
        assert teacher is not None
        assert self.student_to_teacher is not None
        assert self.teacher_to_student is not None
        tokens = mutual_tokens(self.student_to_teacher, self.teacher_to_student)
        self.register_buffer("student_ids", tokens, persistent=False)
        self.register_buffer("teacher_ids", self.student_to_teacher[tokens], persistent=False)
        shared, partners = self.student_ids[: self.topk_vocab], self.teacher_ids[: self.topk_vocab]
        self.t2s = LinearProjector.between_heads(
            teacher.head, student.head, partners, shared, scale_inputs=self.scale_inputs
        )
        self.t2s.to(student.head.weight.device)
        self.s2t = HeadMap(teacher.head, shared, partners)

    def projector_parameters(self, student: int, teacher: int) -> int:
        return student * teacher

    def further_head_products(self) -> tuple[int, int]:
        # Both teachers' choices; for a distribution both logits once more, and the projector's gradient.
        return (3, 2) if self.projector_learns == "distribution" else (1, 1)

    def forward(
        self, student: Side, teacher: Side | None = None, alignment: Alignment | None = None
    ) -> ObjectiveOutput:
        assert teacher is not None
        assert self.teacher_to_student is not None
        aligned = self._alignment(student, teacher, alignment)
        tokens = len(student)
        i, j = aligned.pairs.unbind(1) if self.positions == "pairs" else aligned.starts
        projected = self.t2s(teacher.hidden.detach()[j])
        labels = self.teacher_to_student[token_argmax(teacher.hidden[j], teacher.head)]
        # Masks and counts stay on the device: which pairs count is never asked for by the host.
        kept = labels >= 0
        pairs = kept.sum()
        ratio, per_pair = self.kd_share(student), tokens / pairs.clamp(min=1)
        per_ce, soft = per_pair, None
        if self.projector_learns == "distribution":
            per_ce = pairs.new_full((), tokens / max(len(j), 1), dtype=per_pair.dtype)
            soft = self._from_distribution(projected, student.head.detach(), teacher, j)
        if not student.hidden.shape[1]:
            learnt = None if soft is None else (soft, len(j))
            return projector_alone(student, projected, labels, ratio * per_ce, self.memory_budget_mb, learnt)
        agreeing = kept & (token_argmax(projected, student.head) == labels)
        chosen = self._chosen(kept, agreeing)
        per_chosen = tokens / chosen.sum().clamp(min=1)
        targets = torch.full_like(student.labels, -1).index_put((i,), labels)
        moved = projected.new_zeros(tokens, projected.shape[1]).index_put((i,), projected)
        loss, stats = student_space(
            student,
            moved,
            targets,
            self.divergence,
            self.temperature,
            SpaceWeights(1 - ratio, ratio * per_pair if soft is None else 0.0, ratio * per_chosen),
            memory_budget_mb=self.memory_budget_mb,
            only_agreeing=False,
            kd_mask=projected.new_zeros(tokens).index_put((i,), chosen.to(projected.dtype)),
        )
        paired = replace(
            teacher,
            hidden=teacher.hidden[j],
            ids=teacher.ids[j],
            labels=teacher.labels[j],
            sequence=teacher.sequence[j],
        )
        back = self.s2t(student.hidden[i], student.head, teacher.head)
        s2t_loss, s2t = teacher_space(
            paired,
            back,
            self.divergence,
            self.temperature,
            ratio * per_pair,
            memory_budget_mb=self.memory_budget_mb,
            kept=kept,
        )
        if soft is not None:
            loss = loss + ratio * per_ce * soft
            stats["t2s_ce"] = soft.detach()
        terms = {
            "ce": stats["ce"],
            "t2s_ce": stats["t2s_ce"] * per_ce,
            "t2s_kd": stats["t2s_kd"] * per_chosen,
            "s2t_kd": s2t["s2t_kd"] * per_pair,
        }
        terms["kd"] = terms["t2s_ce"] + terms["t2s_kd"] + terms["s2t_kd"]
        count = student.labels.new_full((), tokens)
        metrics = self.alignment_metrics(student, alignment, targets >= 0)
        metrics |= self._metrics(student, i, labels, pairs, stats, s2t)
        return ObjectiveOutput(
            loss + s2t_loss, count, {k: Ratio(v, count) for k, v in terms.items()}, metrics
        )

    def _from_distribution(self, projected: Tensor, head: Head, teacher: Side, j: Tensor) -> Tensor:
        """The projected teacher's cross-entropy from the teacher's distribution, summed over pairs."""

        def cross_entropy(
            own: Tensor, theirs: Tensor, paired: Tensor, rows: tuple[Tensor, ...]
        ) -> tuple[Tensor, dict[str, Tensor]]:
            p = theirs.index_select(-1, self.teacher_ids).softmax(-1)
            log_q = own.index_select(-1, self.student_ids).log_softmax(-1)
            return -(p * log_q).sum(-1).where(paired, 0).sum(), {}

        total, _ = paired_logit_sum(
            cross_entropy,
            (projected, head),
            (teacher.hidden.detach()[j], teacher.head.detach()),
            torch.arange(len(j), device=j.device),
            (),
            most=len(j),
            memory_budget_mb=self.memory_budget_mb,
            copies=self.vocabulary_copies,
        )
        return total

    def _metrics(
        self,
        student: Side,
        i: Tensor,
        labels: Tensor,
        pairs: Tensor,
        stats: dict[str, Tensor],
        s2t: dict[str, Tensor],
    ) -> dict[str, Ratio]:
        tokens, all_pairs = (i.new_full((), n) for n in (len(student), len(i)))
        choice, gold = stats["student_choice"], student.labels
        metrics = {
            "student_accuracy": Ratio((choice == gold).sum(), tokens),
            "student_entropy": Ratio(stats["student_entropy"], tokens),
            "t2s_agreement": Ratio(stats["t2s_accuracy"], pairs),
            "max_t2s_prob": Ratio(stats["max_t2s_prob"], pairs),
            "agreement": Ratio((choice[i] == labels).sum(), pairs),
            "label_ratio": Ratio(pairs, all_pairs),
        }
        assert self.student_to_teacher is not None
        same = (labels >= 0) & (s2t["s2t_choice"] == self.student_to_teacher[choice[i]])
        metrics["s2t_agreement"] = Ratio(same.sum(), pairs)
        for name in ("s2t_accuracy", "teacher_accuracy"):
            metrics[name] = Ratio(s2t[name], pairs)
        metrics["teacher_entropy"] = Ratio(s2t["teacher_entropy"], all_pairs)
        return metrics

    def _chosen(self, kept: Tensor, agreeing: Tensor) -> Tensor:
        """``[pairs]``: the agreeing pairs, or all kept ones where more than the threshold agree."""
        enough = agreeing.sum() > self.agreement_threshold * kept.sum()
        return torch.where(enough, kept, agreeing)
