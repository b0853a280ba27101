"""General online logit distillation (GOLD): merged byte groups, matched and unmatched tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.functional import chunk_tokens, token_log_prob
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.functional.paired_logits import first_rows
from dskd_lightning.objectives.paired import PairedObjective, Pairs, Partners
from dskd_lightning.objectives.uld import sorted_l1
from dskd_lightning.structures import Alignment, ModelSpace, Side

__all__ = ["GOLDObjective", "group_starts", "measure_divergence"]


def group_starts(student: Side, starts: tuple[Tensor, Tensor]) -> Tensor:
    """``[n]``: at the student position of each of `Alignment.starts` the teacher position, else -1."""
    position = torch.full_like(student.labels, -1)
    position[starts[0]] = starts[1]
    return position


def measure_divergence(*, log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon sum ``[...]`` of two measures in logs ``[..., size]``.

    They need not sum to 1: no renormalisation. ``beta`` 0 and 1 are ``sum p log(p / q)`` and
    ``sum q log(q / p)``.
    """
    floor = torch.finfo(log_p.dtype).min / 4  # a probability of 0 adds 0, not NaN
    log_p, log_q = log_p.clamp(min=floor), log_q.clamp(min=floor)
    p, q = log_p.exp(), log_q.exp()
    if beta == 0.0:
        return (p * (log_p - log_q)).sum(-1)
    if beta == 1.0:
        return (q * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


class GOLDObjective(PairedObjective):
    """Hybrid of a divergence on matched tokens and sorted L1 on the rest, over byte groups.

    A group's distribution is the one at its first position, times the scalar probabilities of its
    observed later tokens, on either side. Tokens that both vocabularies hold take the generalised
    Jensen-Shannon sum; those of one side alone are sorted and compared by L1, as in ULD. Neither
    part is renormalised. Each group adds one term.

    Args:
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        temperature: divides both sides' logits in KD.
        beta: weight of the teacher in the mixture; 0 is the forward KL.
        matched_weight: weight of the matched part; None takes the share of the student's
            vocabulary that is matched.
        unmatched_weight: weight of the unmatched part; None takes one minus that share.
        skip_eos: leave out groups at which the student must predict the end of sequence.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.
    """

    student_matched: Tensor
    teacher_matched: Tensor
    student_rest: Tensor
    teacher_rest: Tensor
    vocabulary_copies = 20  # both sides' log-probabilities, their parts, sorts and gradients

    def __init__(
        self,
        kd_ratio: float = 0.5,
        temperature: float = 1.0,
        beta: float = 0.5,
        matched_weight: float | None = 1.0,
        unmatched_weight: float | None = 1.0,
        skip_eos: bool = False,
        memory_budget_mb: float = DEFAULT_BUDGET_MB,
    ) -> None:
        super().__init__(kd_ratio, temperature, memory_budget_mb)
        if not 0.0 <= beta <= 1.0:
            raise UserError(f"beta of {type(self).__name__} must lie in [0, 1], not {beta}.")
        self.beta = beta
        self.matched_weight = matched_weight
        self.unmatched_weight = unmatched_weight
        self.skip_eos = skip_eos
        self.eos: int | None = None
        self.overlap = 0.0

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        super().configure(student, teacher)
        assert teacher is not None
        if self.skip_eos:
            self.eos = student.tokenizer.eos_token_id
            if self.eos is None:
                raise UserError("skip_eos: the student's tokenizer names no end-of-sequence token; set one.")
        self._match(self.matched_tokens(student, teacher), teacher.vocab_size)

    def further_head_products(self) -> tuple[int, int]:
        return 1, 0  # the backward pass makes those of groups' later tokens once more

    def matched_tokens(self, student: ModelSpace, teacher: ModelSpace) -> Tensor:
        """``[student vocab]``: the teacher token that each student token is matched with, or -1."""
        assert self.student_to_teacher is not None
        return self.student_to_teacher

    def _match(self, match: Tensor, teacher_vocab: int) -> None:
        self.overlap = int((match >= 0).sum()) / len(match)
        ids = (match >= 0).nonzero().squeeze(1)
        unmatched = torch.ones(teacher_vocab, dtype=torch.bool, device=match.device)
        # Several student tokens may match one teacher token: their probabilities are summed there.
        teacher_ids, slots = match[ids].unique(return_inverse=True)
        unmatched[teacher_ids] = False
        for name, value in {
            "student_matched": ids,
            "teacher_matched": teacher_ids,
            "slots": slots,
            "order": slots.argsort(),
            "student_rest": (match < 0).nonzero().squeeze(1),
            "teacher_rest": unmatched.nonzero().squeeze(1),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def partners(self, student: Side, teacher: Side, alignment: Alignment) -> Partners:
        starts = alignment.starts
        position = group_starts(student, starts)
        if self.eos is not None:
            position = position.masked_fill(student.labels == self.eos, -1)
        later = self._later(student, alignment.student_group, starts[0])
        with torch.no_grad():
            teacher_later = self._later(teacher, alignment.teacher_group, starts[1])
        group = alignment.student_group.clamp(min=0)
        return Partners(position, (teacher_later[group], later[group]), alignment.groups)

    def _later(self, side: Side, group: Tensor, first: Tensor) -> Tensor:
        """``[max(groups, 1)]``, log-probability of each group's tokens behind its first."""
        later = group >= 0
        later[first] = False
        order, count = first_rows(later, len(group) - len(first))
        rows = order[:count]
        log_prob = token_log_prob(
            side.hidden[rows],
            side.head,
            side.labels[rows],
            temperature=self.temperature,
            chunk_size=chunk_tokens(side.head.vocab_size, self.memory_budget_mb, device=side.hidden.device),
        )
        places = group[rows].clamp(min=0)
        return log_prob.new_zeros(max(len(first), 1)).index_add(0, places, log_prob.where(later[rows], 0))

    def compare(self, pairs: Pairs) -> dict[str, Tensor]:
        teacher_later, student_later = pairs.extras
        log_p = (pairs.teacher / self.temperature).log_softmax(-1) + teacher_later.unsqueeze(1)
        log_q = (pairs.student / self.temperature).log_softmax(-1) + student_later.unsqueeze(1)
        matched_q = log_q.index_select(-1, self.student_matched)
        if len(self.teacher_matched) < len(self.student_matched):
            summed = matched_q.new_zeros(len(matched_q), len(self.teacher_matched))
            tiny = torch.finfo(summed.dtype).tiny
            matched_q = summed.index_add(1, self.get_buffer("slots"), matched_q.exp()).clamp(min=tiny).log()
        else:
            matched_q = matched_q.index_select(-1, self.get_buffer("order"))
        matched_p = log_p.index_select(-1, self.teacher_matched)
        matched = measure_divergence(log_p=matched_p, log_q=matched_q, beta=self.beta)
        unmatched = sorted_l1(
            log_p.index_select(-1, self.teacher_rest).exp(), log_q.index_select(-1, self.student_rest).exp()
        )
        weights = (
            self.overlap if self.matched_weight is None else self.matched_weight,
            1 - self.overlap if self.unmatched_weight is None else self.unmatched_weight,
        )
        return {"matched": weights[0] * matched, "unmatched": weights[1] * unmatched}
