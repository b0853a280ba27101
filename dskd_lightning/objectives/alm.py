"""Approximate likelihood matching (ALM, arXiv 2503.20083)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.functional import chunked_map
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB, head_parameters
from dskd_lightning.functional.precision import summable, wide
from dskd_lightning.objectives._vocabulary import extension_ranges
from dskd_lightning.objectives.base import ObjectiveOutput
from dskd_lightning.objectives.cross_tokenizer import CrossTokenizerObjective
from dskd_lightning.structures import Alignment, LogProbabilities, ModelSpace, Ratio, Side

__all__ = ["ALMObjective", "bernoulli_kl"]


def bernoulli_kl(*, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL ``[...]`` of two coins that show heads with ``exp(log_p)`` and ``exp(log_q)``."""
    highest = -torch.finfo(log_p.dtype).eps  # a certain event has no finite log odds
    log_p, log_q = log_p.clamp(max=highest), log_q.clamp(max=highest)
    tails_p, tails_q = -torch.expm1(log_p), -torch.expm1(log_q)
    return log_p.exp() * (log_p - log_q) + tails_p * (tails_p.log() - tails_q.log())


_HALF = math.log(0.5)


class ALMObjective(CrossTokenizerObjective):
    r"""Likelihoods of byte-aligned chunks, compared as coins.

    The chunks are the smallest byte-aligned groups; ``l_t`` and ``l_s``, the sums of their tokens'
    log-probabilities, are compared as :math:`\tau f(e^{l_t / \tau}, e^{l_s / \tau})`. Only the
    likelihood of the text is matched, so that no map between the vocabularies is needed.

    Both divergences fall as one over the temperature. The factor :math:`\tau` keeps the term beside
    the cross-entropy: for large temperatures ``bernoulli_kl`` becomes
    :math:`a \log (a / b) - a + b` of the surprisals :math:`a = -l_t` and :math:`b = -l_s`. (The paper
    balances the terms by the norms of their gradients instead.)

    A chunk's likelihood as tokens is less than as bytes where the tokenizer would rather not stop
    there: after the chunk's last token ``u``, all text that a longer token ``u...`` covers is out
    of reach. The bias of a chunk is the probability of all tokens that begin with the bytes of
    ``u`` and go on, over that of those and ``u``, at the position that predicts ``u``. Chunks
    whose bias exceeds ``bias_threshold`` on either side are left out, and counted. (Longer tokens
    that would begin before ``u`` are not counted.)

    Of a teacher behind an endpoint or in a file the log-probabilities of the observed tokens are all that
    is needed, whatever the two tokenizers. Its own bias isn't known then: the student's alone is held
    against the threshold. Chunks with a token of which nothing is known are left out.

    Args:
        kd_ratio: ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        temperature: ``tau``, on chunk log-likelihoods; logits keep temperature 1.
        divergence: ``bernoulli_kl``, or ``log_difference``, the absolute difference of logs.
        bias_threshold: largest bias of a chunk; None keeps all chunks and needs no tokenizers.
        weight: factor on KD, beside the temperature.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk of tokens.
    """

    needs_vocabulary_map = False
    learns_from_log_probabilities = True

    def __init__(
        self,
        kd_ratio: float = 0.5,
        temperature: float = 100.0,
        divergence: Literal["bernoulli_kl", "log_difference"] = "bernoulli_kl",
        bias_threshold: float | None = 0.1,
        weight: float = 1.0,
        memory_budget_mb: float = DEFAULT_BUDGET_MB,
    ) -> None:
        super().__init__(kd_ratio, temperature, memory_budget_mb)
        if divergence not in ("bernoulli_kl", "log_difference"):
            raise UserError(
                f"divergence of ALMObjective must be 'bernoulli_kl' or 'log_difference', not {divergence!r}."
            )
        if bias_threshold is not None and not 0.0 <= bias_threshold <= 1.0:
            raise UserError(
                f"bias_threshold of ALMObjective must lie in [0, 1], not {bias_threshold}; "
                "null keeps all chunks."
            )
        self.divergence = divergence
        self.bias_threshold = bias_threshold
        self.weight = weight
        for side in ("student", "teacher"):
            for name in ("order", "first", "last"):
                self.register_buffer(f"{side}_{name}", None, persistent=False)

    def configure(self, student: ModelSpace, teacher: ModelSpace | None) -> None:
        super().configure(student, teacher)
        assert teacher is not None
        if self.bias_threshold is None:
            return
        for side, space in (("student", student), ("teacher", teacher)):
            if space.tokenizer is None:
                raise UserError(
                    f"bias_threshold of ALMObjective needs the {side}'s tokenizer; or set it to null."
                )
            for name, value in zip(("order", "first", "last"), extension_ranges(space), strict=True):
                setattr(self, f"{side}_{name}", value)

    def further_head_products(self) -> tuple[int, int]:
        return 1, 0  # the backward pass makes the logits once more

    def forward(
        self, student: Side, teacher: Side | None = None, alignment: Alignment | None = None
    ) -> ObjectiveOutput:
        assert teacher is not None
        aligned = self._alignment(student, teacher, alignment)
        read_s = self._read("student", student, self._chunk(student, teacher))
        with torch.no_grad():
            told = teacher.log_probs
            if told is None:
                read_t = self._read("teacher", teacher, self._chunk(student, teacher))
            else:
                read_t = _observed(told)
        logs, kept = [], torch.ones(aligned.groups, dtype=torch.bool, device=student.labels.device)
        for read, group in ((read_s, aligned.student_group), (read_t, aligned.teacher_group)):
            slots = group.where(group >= 0, aligned.groups)  # the last takes those without a group
            total = read.new_zeros(aligned.groups + 1).index_add(0, slots, read[:, 0])[:-1]
            logs.append(total / self.temperature)
            if self.bias_threshold is not None:
                places = torch.arange(len(group), device=group.device)
                last = group.new_zeros(aligned.groups + 1).scatter_reduce(0, slots, places, "amax")[:-1]
                kept &= read[last, 1].detach() <= self.bias_threshold
        if told is not None:
            slots = aligned.teacher_group.where(aligned.teacher_group >= 0, aligned.groups)
            unknown = slots.new_zeros(aligned.groups + 1).index_add(0, slots, (~told.known).to(slots))
            kept &= unknown[:-1] == 0
        # Two equal likelihoods differ by nothing: the device isn't asked how many chunks are kept.
        log_q, log_p = (log.to(logs[0]).where(kept, _HALF) for log in logs)
        if self.divergence == "bernoulli_kl":
            each = bernoulli_kl(log_p=log_p, log_q=log_q)
        else:
            each = (log_p - log_q).abs()
        kd = self.weight * self.temperature * each.sum()
        ce = -read_s[:, 0].sum()
        ratio = self.kd_share(student)
        loss = (1 - ratio) * ce + ratio * kd
        tokens = student.labels.new_full((), len(student))
        covered = (aligned.student_group >= 0) & torch.cat([kept, kept.new_zeros(1)])[aligned.student_group]
        metrics = self.alignment_metrics(student, alignment, covered)
        metrics["chunks_kept"] = Ratio(kept.sum(), tokens.new_full((), aligned.groups))
        for name, read in (("student", read_s.detach()), ("teacher", read_t)):
            count = tokens.new_full((), len(read))
            metrics[f"{name}_accuracy"] = Ratio(read[:, 2].sum(), count)
            metrics[f"{name}_entropy"] = Ratio(read[:, 3].sum(), count)
        if told is not None:  # the rest of its distribution isn't known
            del metrics["teacher_entropy"]
        pairs = aligned.pairs
        agree = read_s[pairs[:, 0], 2].detach() * read_t[pairs[:, 1], 2]
        metrics["agreement"] = Ratio(agree.sum(), tokens.new_full((), len(pairs)))
        terms = {"ce": Ratio(ce.detach(), tokens), "kd": Ratio(kd.detach(), tokens)}
        return ObjectiveOutput(loss, tokens, terms, metrics)

    def _read(self, name: str, side: Side, chunk_size: int) -> Tensor:
        """``[tokens, 4]``: log-probability of the label, bias after it, hit of the argmax, entropy."""
        ranges = [getattr(self, f"{name}_{part}") for part in ("order", "first", "last")]

        def read(chunk: tuple[Any, ...], parameters: tuple[Any, ...]) -> Tensor:
            hidden, labels = chunk
            logits = replace(side.head, weight=parameters[0], bias=parameters[1]).logits(hidden)
            log_p = wide(logits).log_softmax(-1)
            chosen = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            with torch.no_grad():
                p = log_p.exp()
                bias = torch.zeros_like(chosen) if ranges[0] is None else _bias(p, labels, *ranges)
                hit = (log_p.argmax(-1) == labels).to(p)
                entropy = torch.special.entr(p).sum(-1)
            return torch.stack([chosen, bias, hit, entropy], dim=1)

        return chunked_map(
            read, (side.hidden, side.labels), head_parameters(side.head), chunk_size=chunk_size
        )


def _observed(told: LogProbabilities) -> Tensor:
    """As `ALMObjective._read`, of log-probabilities: no bias, and no entropy."""
    values = wide(told.values)
    first = values[:, 0]
    hit = (told.known & (first >= values.amax(-1))).to(values)
    return torch.stack([first, torch.zeros_like(first), hit, torch.zeros_like(first)], dim=1)


def _bias(p: Tensor, labels: Tensor, order: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Share ``[tokens]`` of the mass of tokens longer than the label, of those and the label."""
    # Sorted by bytes, the tokens that begin with some bytes stand next to each other.
    below = torch.nn.functional.pad(summable(p.index_select(-1, order)).cumsum(-1), (1, 0))
    bounds = below.gather(-1, torch.stack([first[labels], last[labels]], dim=-1))
    longer = (bounds[:, 1] - bounds[:, 0]).to(p)
    chosen = p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return longer / (longer + chosen).clamp(min=torch.finfo(p.dtype).tiny)
