"""Objectives on what an endpoint tells of a teacher, against the same teacher's hidden states and loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dskd_lightning.functional import ForwardKL, ReverseKL, top_log_probs
from dskd_lightning.objectives import ALMObjective, LogitKDObjective, TopKObjective
from dskd_lightning.structures import Alignment, Head, LogProbabilities, ModelSpace, Side

VOCAB, N, M = 19, 6, 8


def side(tokens: int, vocab: int = VOCAB, hidden: int = 4) -> Side:
    return Side(
        hidden=torch.randn(tokens, hidden, dtype=torch.float64),
        head=Head(2 * torch.randn(vocab, hidden, dtype=torch.float64)),
        embeddings=torch.zeros(vocab, hidden, dtype=torch.float64),
        ids=torch.randint(vocab, (tokens,)),
        labels=torch.randint(vocab, (tokens,)),
        sequence=torch.zeros(tokens, dtype=torch.long),
    )


def told(teacher: Side, k: int) -> Side:
    """The side of a teacher of which no more is known."""
    ids, values = top_log_probs(teacher.head.logits(teacher.hidden), teacher.labels, k)
    vocab = teacher.head.vocab_size
    empty = teacher.hidden.new_zeros(vocab, 0)
    return replace(
        teacher, hidden=teacher.hidden[:, :0], head=Head(empty), embeddings=empty,
        log_probs=LogProbabilities(ids, values),
    )  # fmt: skip


def made(objective, student: Side, teacher: Side):
    objective.configure(
        ModelSpace(student.head, student.embeddings), ModelSpace(teacher.head, teacher.embeddings)
    )
    return objective


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()])
def test_a_teacher_that_is_here_and_one_that_told_its_top_k_teach_the_same(divergence) -> None:
    teacher, student = side(N), side(N)
    student = replace(student, labels=teacher.labels, hidden=student.hidden.requires_grad_())
    losses = []
    for given in (teacher, told(teacher, 5)):
        objective = made(TopKObjective(divergence, k=5), student, given)
        output = objective(student, given)
        (gradient,) = torch.autograd.grad(output.loss, student.hidden)
        losses.append((output.loss.item(), gradient))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-12)
    torch.testing.assert_close(losses[0][1], losses[1][1])
    p = teacher.head.logits(teacher.hidden).softmax(-1)
    q = student.head.logits(student.hidden).softmax(-1).detach()
    ce = -sum(math.log(q[i, y]) for i, y in enumerate(student.labels.tolist()))
    kd = 0.0
    for i, y in enumerate(student.labels.tolist()):
        kept = {y, *p[i].topk(5).indices.tolist()}
        pairs = [(p[i, v].item(), q[i, v].item()) for v in kept]
        pairs.append(tuple(1 - math.fsum(side) for side in zip(*pairs, strict=True)))
        if isinstance(divergence, ReverseKL):
            pairs = [(b, a) for a, b in pairs]
        kd += math.fsum(a * math.log(a / b) for a, b in pairs)
    assert losses[0][0] == pytest.approx(0.5 * ce + 0.5 * kd, rel=1e-9)
    assert output.terms["kd"].value.item() == pytest.approx(kd / N, rel=1e-9)


def test_with_the_whole_vocabulary_it_is_logit_distillation() -> None:
    teacher, student = side(N), side(N)
    student = replace(student, labels=teacher.labels)
    top = made(TopKObjective(k=VOCAB), student, teacher)(student, teacher)
    whole = made(LogitKDObjective(temperature=1.0), student, teacher)(student, teacher)
    assert top.loss.item() == pytest.approx(whole.loss.item(), rel=1e-9)


def test_positions_of_which_nothing_is_known_teach_nothing() -> None:
    teacher, student = side(N), side(N)
    student = replace(student, labels=teacher.labels)
    known = told(teacher, 3)
    gone = LogProbabilities(known.log_probs.ids.clone(), known.log_probs.values.clone())
    gone.ids[2:], gone.values[2:] = -1, -torch.inf
    objective = made(TopKObjective(kd_ratio=1.0), student, known)
    loss = objective(student, replace(known, log_probs=gone)).loss
    rows = slice(0, 2)
    part = [replace(s, hidden=s.hidden[rows], labels=s.labels[rows]) for s in (student, known)]
    expected = objective(part[0], replace(part[1], log_probs=known.log_probs[rows])).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def aligned() -> Alignment:
    """Groups: student {0}, {1, 2}, {3}, {4, 5}; teacher {0, 1}, {2}, {3, 4, 5}, {6, 7}."""
    return Alignment(
        student_group=torch.tensor([0, 1, 1, 2, 3, 3]),
        teacher_group=torch.tensor([0, 0, 1, 2, 2, 2, 3, 3]),
        student_end=torch.arange(N), teacher_end=torch.arange(M), pairs=torch.empty(0, 2, dtype=torch.long),
        groups=4,
    )  # fmt: skip


@pytest.mark.parametrize("k", [0, 4])
def test_likelihood_matching_needs_the_observed_tokens_alone(k) -> None:
    student, teacher = side(N, VOCAB), side(M, 11)
    student = replace(student, hidden=student.hidden.requires_grad_())
    objective = ALMObjective(bias_threshold=None, temperature=10.0, kd_ratio=1.0)
    only = told(teacher, 4)
    only = replace(
        only, log_probs=LogProbabilities(only.log_probs.ids[:, : 1 + k], only.log_probs.values[:, : 1 + k])
    )
    results = []
    for given in (teacher, only):
        loss = made(objective, student, given)(student, given, aligned()).loss
        results.append((loss, torch.autograd.grad(loss, student.hidden)[0]))
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1])
    logs = [
        [s.head.logits(s.hidden)[i].log_softmax(-1)[y].item() for i, y in enumerate(s.labels.tolist())]
        for s in (teacher, student)
    ]
    expected = 0.0
    for mine, theirs in (([0], [0, 1]), ([1, 2], [2]), ([3], [3, 4, 5]), ([4, 5], [6, 7])):
        p = math.exp(math.fsum(logs[0][j] for j in theirs) / 10)
        q = math.exp(math.fsum(logs[1][i] for i in mine) / 10)
        expected += 10 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert results[0][0].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("divergence", ["bernoulli_kl", "log_difference"])
def test_likelihood_matching_keeps_its_strength_at_any_large_temperature(divergence) -> None:
    student, teacher = side(N), side(M, 11)
    student = replace(student, hidden=student.hidden.requires_grad_())
    expected = torch.zeros((), dtype=torch.float64)
    logs = [
        s.head.logits(s.hidden).log_softmax(-1).gather(-1, s.labels[:, None])[:, 0]
        for s in (teacher, student)
    ]
    for mine, theirs in (([0], [0, 1]), ([1, 2], [2]), ([3], [3, 4, 5]), ([4, 5], [6, 7])):
        a, b = -logs[0][theirs].sum(), -logs[1][mine].sum()
        expected = expected + ((a - b).abs() if divergence == "log_difference" else a * (a / b).log() - a + b)
    expected_grad = torch.autograd.grad(expected, student.hidden)[0]
    for temperature in (1e4, 1e6):
        objective = ALMObjective(
            bias_threshold=None, temperature=temperature, kd_ratio=1.0, divergence=divergence
        )
        loss = made(objective, student, teacher)(student, teacher, aligned()).loss
        grad = torch.autograd.grad(loss, student.hidden)[0]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-2, atol=1e-4)


def test_likelihood_matching_leaves_unknown_chunks_out() -> None:
    student, teacher = side(N), side(M, 11)
    known = told(teacher, 0)
    gone = LogProbabilities(known.log_probs.ids.clone(), known.log_probs.values.clone())
    gone.ids[4], gone.values[4] = -1, -torch.inf
    objective = made(ALMObjective(bias_threshold=None, kd_ratio=1.0), student, known)
    output = objective(student, replace(known, log_probs=gone), aligned())
    assert torch.isfinite(output.loss)
    assert output.metrics["chunks_kept"].value.item() == 0.75
    assert output.loss.item() < objective(student, known, aligned()).loss.item()
