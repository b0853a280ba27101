"""Divergences of the largest entries and a tail bucket against sums written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dskd_lightning.functional import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    student_buckets,
    teacher_buckets,
    top_log_probs,
)

TOKENS, VOCAB, K = 7, 23, 5


def jensen_shannon(pairs: list[tuple[float, float]]) -> float:
    halves = ((x, (a + b) / 2) for a, b in pairs for x in (a, b))
    return math.fsum(0.5 * x * math.log(x / m) for x, m in halves)


def written_out(p_logits, q_logits, labels, k) -> list[dict[str, float]]:
    """Every divergence of one token after the other, with plain Python's floats."""
    found = []
    for row_p, row_q, label in zip(p_logits.tolist(), q_logits.tolist(), labels.tolist(), strict=True):
        p, q = ([math.exp(x) for x in row] for row in (row_p, row_q))
        p, q = [x / math.fsum(p) for x in p], [x / math.fsum(q) for x in q]
        order = sorted(range(len(p)), key=lambda i: -p[i])[:k]
        kept = sorted({label, *order})
        rest = [i for i in range(len(p)) if i not in kept]
        bp, bq = ([*(d[i] for i in kept), math.fsum(d[i] for i in rest)] for d in (p, q))
        pairs = [(a, b) for a, b in zip(bp, bq, strict=True) if a > 0]
        whole = list(zip(p, q, strict=True))
        found.append(
            {
                "ForwardKL": math.fsum(a * math.log(a / b) for a, b in pairs),
                "ReverseKL": math.fsum(b * math.log(b / a) for a, b in pairs),
                "JensenShannon": math.fsum(
                    0.5 * a * math.log(2 * a / (a + b)) + 0.5 * b * math.log(2 * b / (a + b))
                    for a, b in pairs
                ),
                "whole ForwardKL": math.fsum(a * math.log(a / b) for a, b in whole),
                "whole ReverseKL": math.fsum(b * math.log(b / a) for a, b in whole),
                "whole JensenShannon": math.fsum(
                    0.5 * a * math.log(2 * a / (a + b)) + 0.5 * b * math.log(2 * b / (a + b))
                    for a, b in whole
                ),
            }
        )
    return found


def case(dtype=torch.float64):
    p, q = 3 * torch.randn(TOKENS, VOCAB, dtype=dtype), 2 * torch.randn(TOKENS, VOCAB, dtype=dtype)
    labels = p.argsort(-1, descending=True)[torch.arange(TOKENS), torch.arange(TOKENS) * 3]  # some in the top
    return p, q, labels


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon()])
@pytest.mark.parametrize("k", [1, K, VOCAB - 1, VOCAB])
def test_buckets_are_the_written_out_sums_and_bound_the_whole_from_below(divergence, k) -> None:
    p, q, labels = case()
    ids, values = top_log_probs(p, labels, k)
    found = divergence(student_buckets(q, ids), teacher_buckets(ids, values, VOCAB), 1.0)
    name = type(divergence).__name__
    expected = written_out(p, q, labels, k)
    for value, exact in zip(found.tolist(), expected, strict=True):
        assert value == pytest.approx(exact[name], rel=1e-9, abs=1e-12)
        assert value <= exact[f"whole {name}"] + 1e-9
    if k == VOCAB:
        for value, exact in zip(found.tolist(), expected, strict=True):
            assert value == pytest.approx(exact[f"whole {name}"], rel=1e-9)


@pytest.mark.parametrize("k", [1, K, VOCAB])
def test_gradients_are_those_of_numbers(k) -> None:
    p, q, labels = case()
    ids, values = top_log_probs(p, labels, k)
    buckets = teacher_buckets(ids, values, VOCAB)

    def loss(logits):
        return ReverseKL()(buckets, student_buckets(logits, ids), 1.0)

    assert torch.autograd.gradcheck(loss, q.requires_grad_())


def test_no_token_is_counted_twice() -> None:
    p, _, labels = case()
    ids, values = top_log_probs(p, labels, K)
    assert torch.equal(ids[:, 0], labels)
    for row, log_p in zip(ids.tolist(), values.tolist(), strict=True):
        kept = [i for i in row if i >= 0]
        assert len(kept) == len(set(kept))
        assert [math.isinf(x) for x in log_p] == [i < 0 for i in row]


def test_a_light_tail_keeps_its_digits_and_rounding_makes_no_nan() -> None:
    logits = torch.tensor([[30.0, 0.0, 0.0, 0.0]])
    ids = torch.tensor([[0]])
    rest = student_buckets(logits, ids)[0, 1].item()
    assert rest == pytest.approx(math.log(3) - 30, rel=1e-6)  # one minus the first would be 0
    over = teacher_buckets(ids, torch.tensor([[1e-6]]), 4)  # as a server may round
    value = ForwardKL()(over, student_buckets(logits.requires_grad_(), ids), 1.0)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(logits.grad).all()
