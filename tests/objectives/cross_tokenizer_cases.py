"""Sides, alignments and tokenizers for tests of cross-tokenizer objectives, made on the spot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from conftest import make_tokenizer
from torch import Tensor

from dskd_lightning.alignment.byte_spans import token_byte_spans
from dskd_lightning.alignment.exact import align, batch_alignments
from dskd_lightning.objectives.base import Objective, ObjectiveOutput
from dskd_lightning.structures import Alignment, Head, ModelSpace, Side

TEXTS = [
    "The quick brown fox jumps over the lazy dog",
    "apples, pears and plums! 12345",
    "naïve café 🙂 日本",
]


@cache
def tokenizer(kind: str, vocab_size: int):
    return make_tokenizer(kind, vocab_size)


@dataclass
class Case:
    """Two sides of one batch in float64 and their alignment."""

    student: Side
    teacher: Side
    alignment: Alignment
    student_space: ModelSpace
    teacher_space: ModelSpace

    def run(self, objective: Objective, configure: bool = True) -> ObjectiveOutput:
        if configure:
            objective.configure(self.student_space, self.teacher_space)
            objective.double()
        return objective(self.student, self.teacher, self.alignment)

    def gradients(self, loss: Tensor, *more: Tensor) -> list[Tensor]:
        leaves = [self.student.hidden, self.student.head.weight, *more]
        return list(torch.autograd.grad(loss, leaves, retain_graph=True))


def make_side(tok, d: int, seed: int, texts: list[str], vocab_padding: int = 3):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    vocab = len(tok) + vocab_padding
    ids = [[*tok(text, add_special_tokens=False).input_ids, tok.eos_token_id] for text in texts]
    labels = torch.tensor([i for example in ids for i in example])
    read = torch.tensor([i for example in ids for i in [2, *example[:-1]]])
    sequence = torch.tensor([b for b, example in enumerate(ids) for _ in example])
    weight = (draw(vocab, d) * 0.5).requires_grad_()
    hidden = draw(len(labels), d).requires_grad_()
    embeddings = draw(vocab, d)
    side = Side(hidden, Head(weight), embeddings, read, labels, sequence)
    return side, ids, ModelSpace(Head(weight.detach()), embeddings, tok)


def make_case(kinds=(("bpe", 400), ("sentencepiece", 420)), dims=(6, 10), texts=TEXTS, seed: int = 0) -> Case:
    toks = [tokenizer(*kind) for kind in kinds]
    student, ids_s, space_s = make_side(toks[0], dims[0], seed, texts)
    teacher, ids_t, space_t = make_side(toks[1], dims[1], seed + 1, texts)
    teacher = replace(teacher, hidden=teacher.hidden.detach(), head=teacher.head.detach())
    alignment = batch_alignments(
        [
            align(token_byte_spans(toks[0], text, a), token_byte_spans(toks[1], text, b))
            for text, a, b in zip(texts, ids_s, ids_t, strict=True)
        ]
    )
    return Case(student, teacher, alignment, space_s, space_t)


def unaligned(case: Case) -> Case:
    """The same case with nothing aligned."""
    a = case.alignment
    empty = Alignment(
        torch.full_like(a.student_group, -1),
        torch.full_like(a.teacher_group, -1),
        a.student_end,
        a.teacher_end,
        a.pairs[:0],
        0,
    )
    return replace(case, alignment=empty)


def one_example(case: Case, b: int) -> Case:
    """The case cut down to its example ``b``."""
    a, sides = case.alignment, []
    keep = [side.sequence == b for side in (case.student, case.teacher)]
    for side, rows in zip((case.student, case.teacher), keep, strict=True):
        fields = {name: getattr(side, name)[rows] for name in ("hidden", "ids", "labels")}
        sides.append(replace(side, **fields, sequence=torch.zeros_like(fields["ids"])))
    starts = [int(rows.nonzero()[0, 0]) for rows in keep]
    present = a.student_group[keep[0] & (a.student_group >= 0)].unique()
    group_s, group_t = (
        torch.where(g[rows] >= 0, g[rows] - present[0], -1)
        for g, rows in zip((a.student_group, a.teacher_group), keep, strict=True)
    )
    alignment = replace(
        a,
        student_group=group_s,
        teacher_group=group_t,
        student_end=a.student_end[keep[0]],
        teacher_end=a.teacher_end[keep[1]],
        pairs=a.pairs[keep[0][a.pairs[:, 0]]] - torch.tensor(starts),
        groups=len(present),
    )
    return replace(case, student=sides[0], teacher=sides[1], alignment=alignment)
