"""How a student and its teacher see what the student writes by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dskd_lightning.alignment.token_bytes import token_bytes
from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.samples import BatchOfSamples, prompts_of
from dskd_lightning.generation.samples import ResponseSampler, sample_key
from dskd_lightning.models.tokenizer import load_tokenizer
from dskd_lightning.runs.samples import SampledResponse
from dskd_lightning.structures import SAMPLE_STATISTICS, Alignment, DistillationBatch, Ratio, Side
from dskd_lightning.training.fidelity import fidelity

if TYPE_CHECKING:
    from dskd_lightning.module import DistillationModule

__all__ = ["sample_responses", "sampled_batches", "sampled_fidelity"]


def sampled_batches(
    module: DistillationModule, batches: Iterable[DistillationBatch], sampler: ResponseSampler, seed: int
) -> Iterator[DistillationBatch]:
    """The batches with samples of the present student in the place of their last responses.

    The same prompt gets the same random numbers whenever it is asked.
    """
    teachers = [ChatRenderer.from_spec(load_tokenizer(spec), spec) for spec in module.teacher_specs]
    substitute = BatchOfSamples(module.tokenizer, teachers)
    for batch in batches:
        prompts = prompts_of(batch.student)
        keys = [sample_key(prompt, 0, 0) for prompt in prompts]
        drawn = sampler(module.student, module.tokenizer, prompts, keys, seed)
        yield substitute(batch, [[sample] for sample in drawn])


def sampled_fidelity(module: DistillationModule, batch: DistillationBatch) -> dict[str, Ratio]:
    """`fidelity` on a batch of samples, the samples' statistics, and ``teacher_nll_per_byte``.

    ``nll_per_byte`` is then the student's own entropy, and ``reverse_kl`` (student to teacher) what on-policy
    distillation lowers.
    """
    student, teacher, alignment = _sides(module, batch)
    ratios = fidelity(
        student, teacher, alignment, batch.response_bytes, module._shared_tokens, batch.answers(0),
        of_teacher=True,
    )  # fmt: skip
    del ratios["accuracy"], ratios["nll_per_token"]  # of its own samples it says nothing
    assert batch.samples is not None
    pairs = zip(SAMPLE_STATISTICS, batch.samples.unbind(), strict=True)
    return ratios | {name: Ratio(total, count) for name, (total, count) in pairs}


def _sides(
    module: DistillationModule, batch: DistillationBatch
) -> tuple[Side, Side | None, Alignment | None]:
    student = module.student_side(batch.student, sampled=True)
    if not module.complete_teachers or not batch.teachers:
        return student, None, None
    return student, module.answer_of(0, batch), batch.alignments[0]


@torch.no_grad()
def sample_responses(
    module: DistillationModule, batch: DistillationBatch, count: int
) -> list[SampledResponse]:
    """The first ``count`` samples of a batch in pieces, with what both models think of each."""
    student, teacher, alignment = _sides(module, batch)
    if teacher is None or not batch.answers(0):
        return []
    groups, other = _groups(student, alignment)
    ours, theirs = _log_probabilities(student), _log_probabilities(teacher)
    table = token_bytes(module.tokenizer)
    prompts = prompts_of(batch.to("cpu").student)
    found = []
    for row in range(min(count, len(batch))):
        at = (student.sequence == row).nonzero().squeeze(1).tolist()
        pieces: list[bytes] = []
        scores: list[tuple[float, float | None]] = []
        last = None
        for position in at:
            group, piece = groups[position], table.pieces[int(student.labels[position])]
            if group >= 0 and group == last:
                pieces[-1] += piece
                scores[-1] = (scores[-1][0] + ours[position], scores[-1][1])
            else:
                pieces.append(piece)
                theirs_here = sum(theirs[j] for j in other.get(group, ())) if group >= 0 else None
                scores.append((ours[position], theirs_here))
            last = group
        found.append(
            SampledResponse(
                prompt=str(module.tokenizer.decode(prompts[row], skip_special_tokens=True)),
                pieces=tuple(piece.decode(errors="replace") for piece in pieces),
                student=tuple(round(score, 4) for score, _ in scores),
                teacher=tuple(None if score is None else round(score, 4) for _, score in scores),
            )
        )
    return found


def _groups(student: Side, alignment: Alignment | None) -> tuple[list[int], dict[int, list[int]]]:
    """Group of each student position, and the teacher's positions of each group."""
    if alignment is None:
        return list(range(len(student))), {at: [at] for at in range(len(student))}
    other: dict[int, list[int]] = {}
    for position, group in enumerate(alignment.teacher_group.tolist()):
        other.setdefault(group, []).append(position)
    return alignment.student_group.tolist(), other


def _log_probabilities(side: Side) -> list[float]:
    """Of the labels, a few rows at a time."""
    values: list[Tensor] = []
    for hidden, labels in zip(side.hidden.split(64), side.labels.split(64), strict=True):
        log_p = side.head.logits(hidden).float().log_softmax(-1)
        values.append(log_p.gather(-1, labels[:, None]).squeeze(-1))
    found: list[float] = torch.cat(values).tolist() if values else []
    return found
