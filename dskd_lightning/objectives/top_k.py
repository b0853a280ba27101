"""Distillation of a teacher's most likely tokens: all that an endpoint or a file tells of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.functional import chunk_tokens, chunked_map, chunked_sum
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB, head_parameters
from dskd_lightning.functional.divergences import Divergence
from dskd_lightning.functional.top_k import NOTHING, student_buckets, teacher_buckets, top_log_probs
from dskd_lightning.objectives._same_vocabulary import SameVocabularyObjective, ratios
from dskd_lightning.objectives.base import ObjectiveOutput
from dskd_lightning.structures import Alignment, LogProbabilities, Ratio, Side

__all__ = ["TopKObjective"]


class TopKObjective(SameVocabularyObjective):
    """``KD = D(teacher || student)`` over the teacher's most likely tokens and one bucket for the rest.

    For a teacher behind an endpoint or in a file, whose log-probabilities are taken as they are, and for one
    that is here, whose ``k`` largest are. Both at temperature 1, since nobody knows how the rest would be
    spread at another. Every divergence of buckets is a lower bound of that of the whole distributions: close
    for the forward KL where the teacher's tail is light, loose for the reverse KL and Jensen-Shannon, which
    don't see how the student spreads the rest.

    Args:
        divergence: of teacher and student; forward KL by default.
        k: tokens of a teacher that is here, besides the observed one.
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.
    """

    learns_from_log_probabilities = True

    def __init__(
        self,
        divergence: Divergence | None = None,
        k: int = 64,
        kd_ratio: float = 0.5,
        memory_budget_mb: float = DEFAULT_BUDGET_MB,
    ) -> None:
        super().__init__(divergence, kd_ratio, 1.0, memory_budget_mb)
        if k < 1:
            raise UserError(f"k of TopKObjective must be at least 1, not {k}.")
        self.k = k

    def forward(
        self, student: Side, teacher: Side | None = None, alignment: Alignment | None = None
    ) -> ObjectiveOutput:
        teacher = self._pair(student, teacher)
        told = self._told(teacher) if teacher.log_probs is None else teacher.log_probs
        vocab = min(student.head.vocab_size, teacher.head.vocab_size)
        outside = told.ids >= student.head.vocab_size  # padding of the larger head
        ids = told.ids.masked_fill(outside, NOTHING)
        log_p = teacher_buckets(ids, told.values, vocab)
        ratio = self.kd_share(student)

        def step(chunk: tuple[Any, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
            hidden, labels, places, buckets, known = chunk
            logits = replace(student.head, weight=parameters[0], bias=parameters[1]).logits(hidden)
            log_q = student_buckets(logits, places)
            kd = (self.divergence(student_logits=log_q, teacher_logits=buckets) * known).sum()
            gold = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1).to(log_q)
            ce = (logits.to(log_q).logsumexp(-1) - gold).sum()
            stats = {"ce": ce, "kd": kd, "choice": logits.argmax(-1)}
            return (1 - ratio) * ce + ratio * kd, stats

        known = told.known.to(log_p)
        size = chunk_tokens(student.head.vocab_size, self.memory_budget_mb, copies=8, device=log_p.device)
        loss, stats = chunked_sum(
            step,
            (student.hidden, student.labels, ids, log_p, known),
            head_parameters(student.head),
            chunk_size=size,
        )
        tokens = student.labels.new_full((), len(student))
        count = told.known.sum()
        mass = (1 - log_p[:, -1].exp()) * known
        metrics = {
            "student_accuracy": Ratio((stats["choice"] == student.labels).sum(), tokens),
            "teacher_top_mass": Ratio(mass.sum(), count),
        }
        if ids.shape[1] > 1:
            best = ids.gather(-1, log_p[:, :-1].argmax(-1, keepdim=True)).squeeze(-1)
            metrics["teacher_accuracy"] = Ratio(((best == teacher.labels) & told.known).sum(), count)
            metrics["agreement"] = Ratio(((best == stats["choice"]) & told.known).sum(), count)
        terms = ratios({"ce": stats["ce"], "kd": stats["kd"]}, tokens)
        return ObjectiveOutput(loss, tokens, terms, metrics)

    @torch.no_grad()
    def _told(self, teacher: Side) -> LogProbabilities:
        """What an endpoint would tell of a teacher that is here."""
        k = min(self.k, teacher.head.vocab_size)

        def read(chunk: tuple[Any, ...], parameters: tuple[Any, ...]) -> Tensor:
            hidden, labels = chunk
            logits = replace(teacher.head, weight=parameters[0], bias=parameters[1]).logits(hidden)
            ids, values = top_log_probs(logits, labels, k)
            # One tensor for both: ids below 2**24 are exact in float32.
            return torch.cat([ids.to(values), values], dim=-1)

        size = chunk_tokens(
            teacher.head.vocab_size, self.memory_budget_mb, copies=4, device=teacher.hidden.device
        )
        both = chunked_map(
            read, (teacher.hidden, teacher.labels), head_parameters(teacher.head), chunk_size=size
        )
        ids, values = both.chunk(2, dim=-1)
        return LogProbabilities(ids.long(), values)
