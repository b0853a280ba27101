"""How well a student predicts the responses and follows its teacher, in sums that add up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dskd_lightning.functional.chunking import chunk_tokens, chunked_sum, head_parameters
from dskd_lightning.functional.precision import summable
from dskd_lightning.structures import Alignment, Head, ModelSpace, Ratio, Side

__all__ = ["fidelity", "likelihood", "nats_per_byte", "shared_tokens"]


def shared_tokens(student: ModelSpace, teacher: ModelSpace) -> tuple[Tensor, Tensor] | None:
    """Student ids and teacher ids ``[shared]`` of the tokens with the same bytes; None without any."""
    from dskd_lightning.alignment.vocabulary import exact_token_map

    if student.tokenizer is None or teacher.tokenizer is None:
        return None
    partner = torch.from_numpy(exact_token_map(student.tokenizer, teacher.tokenizer))
    partner = partner[: student.vocab_size]
    ids = torch.nonzero((partner >= 0) & (partner < teacher.vocab_size)).squeeze(-1)
    return (ids, partner[ids]) if len(ids) else None


def fidelity(
    student: Side,
    teacher: Side | None,
    alignment: Alignment | None,
    response_bytes: Tensor,
    shared_tokens: tuple[Tensor, Tensor] | None = None,
    answers: bool = True,
    of_teacher: bool = False,
) -> dict[str, Ratio]:
    """Likelihood of the gold responses, and closeness to the teacher at temperature 1.

    Across vocabularies closeness is measured on exactly aligned pairs, over the tokens that both
    vocabularies hold, renormalised; those numbers are named ``aligned_``.

    Args:
        student: ``n`` response positions.
        teacher: its ``m`` positions, or None.
        alignment: None where both read the same ids.
        response_bytes: ``[batch]``, UTF-8 bytes of the responses.
        shared_tokens: student ids and teacher ids ``[shared]`` of the same tokens; needed with
            an alignment.
        answers: False where the teacher doesn't answer for these records (it has no positions): closeness
            then counts nothing, under the same names.
        of_teacher: measure its likelihood, too.

    Returns:
        ``nll_per_token``, ``nll_per_byte`` (nats), ``accuracy`` of the gold token, and with a teacher
        ``kl`` (nats, teacher to student), ``reverse_kl`` (student to teacher) and ``agreement`` of the two
        argmaxes, and ``teacher_nll_per_byte``.
    """
    with torch.no_grad():
        sums = likelihood(student)
        count = student.labels.new_full((), len(student))
        ratios = {
            "nll_per_token": Ratio(sums["nll"], count),
            "nll_per_byte": Ratio(sums["nll"], response_bytes.sum()),
            "accuracy": Ratio(sums["correct"], count),
        }
        if teacher is None:
            return ratios
        if of_teacher:
            ratios["teacher_nll_per_byte"] = nats_per_byte(teacher, response_bytes, answers)
        if not answers:
            student = student.nothing()
            count = count.new_zeros(())
        if alignment is None:
            return ratios | _closeness(student.hidden, student.head, teacher.hidden, teacher.head)
        if shared_tokens is None:
            return ratios
        pairs = alignment.pairs
        student_ids, teacher_ids = (ids.to(pairs.device) for ids in shared_tokens)
        closeness = _closeness(
            student.hidden[pairs[:, 0]],
            student.head,
            teacher.hidden[pairs[:, 1]],
            teacher.head,
            (student_ids, teacher_ids),
        )
        aligned = Ratio(count.new_full((), len(pairs)), count)
        return ratios | {f"aligned_{k}": r for k, r in closeness.items()} | {"alignment_ratio": aligned}


def nats_per_byte(side: Side, response_bytes: Tensor, answers: bool = True) -> Ratio:
    """A model's likelihood of the labels; of no bytes where it doesn't answer."""
    return Ratio(likelihood(side)["nll"], response_bytes.sum() * int(answers))


def likelihood(student: Side) -> dict[str, Tensor]:
    """Sums over a model's response positions: ``nll`` of the labels in nats, and argmaxes ``correct``."""

    def step(chunk: tuple[Any, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, labels = chunk
        logits = replace(student.head, weight=parameters[0], bias=parameters[1]).logits(hidden).float()
        gold = logits.gather(-1, labels[:, None]).squeeze(-1)
        nll = summable(logits.logsumexp(-1) - gold).sum()
        return nll, {"nll": nll, "correct": (logits.argmax(-1) == labels).sum()}

    size = chunk_tokens(student.head.vocab_size, device=student.hidden.device)
    parameters = head_parameters(student.head)
    return chunked_sum(step, (student.hidden, student.labels), parameters, chunk_size=size)[1]


def _closeness(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    shared: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Ratio]:
    vocabulary = max(student_head.vocab_size, teacher_head.vocab_size)
    common = min(student_head.vocab_size, teacher_head.vocab_size)  # padding differs in some families

    def log_probabilities(number: int, head: Head, hidden: Tensor, parameters: tuple[Any, ...]) -> Tensor:
        logits = replace(head, weight=parameters[0], bias=parameters[1]).logits(hidden)
        # Of the logits rather than the head, of which each batch would make a copy.
        logits = logits[:, :common] if shared is None else logits.index_select(1, shared[number])
        return logits.float().log_softmax(-1)

    def step(chunk: tuple[Any, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        q = log_probabilities(0, student_head, chunk[0], parameters[:2])
        p = log_probabilities(1, teacher_head, chunk[1], parameters[2:])
        kl = summable((p.exp() * (p - q)).sum(-1)).sum()
        back = summable((q.exp() * (q - p)).sum(-1)).sum()
        return kl, {"kl": kl, "reverse_kl": back, "agree": (p.argmax(-1) == q.argmax(-1)).sum()}

    sums = chunked_sum(
        step,
        (student_hidden, teacher_hidden),
        (*head_parameters(student_head), *head_parameters(teacher_head)),
        chunk_size=chunk_tokens(vocabulary, device=student_hidden.device),
    )[1]
    count = torch.full((), student_hidden.shape[0], device=student_hidden.device)
    return {
        "kl": Ratio(sums["kl"], count),
        "reverse_kl": Ratio(sums["reverse_kl"], count),
        "agreement": Ratio(sums["agree"], count),
    }
