"""Divergences against independent formulas in float64, and the properties that make them divergences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.functional import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    TotalVariation,
    forward_kl,
    fused_distillation,
    jensen_shannon,
    reverse_kl,
)
from dskd_lightning.structures import Head

ALL = [
    ForwardKL(),
    ReverseKL(),
    JensenShannon(),
    JensenShannon(0.2),
    JensenShannon(0.0),
    JensenShannon(1.0),
    SkewedForwardKL(),
    SkewedForwardKL(0.0),
    SkewedReverseKL(0.3),
    AdaptiveKL(),
    AdaptiveKL(0.9),
    TotalVariation(),
]
every = pytest.mark.parametrize("divergence", ALL, ids=repr)
INF = float("inf")


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(divergence: Divergence, p: list[float], q: list[float]) -> float:
    """The definition of METHODS.md, one entry at a time."""

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True))

    def mix(share: float) -> list[float]:
        return [share * x + (1 - share) * y for x, y in zip(p, q, strict=True)]

    if isinstance(divergence, ForwardKL):
        return kl(p, q)
    if isinstance(divergence, ReverseKL):
        return kl(q, p)
    if isinstance(divergence, JensenShannon):
        beta = divergence.beta
        if beta in (0.0, 1.0):
            return kl(q, p) if beta else kl(p, q)
        return beta * kl(p, mix(beta)) + (1 - beta) * kl(q, mix(beta))
    if isinstance(divergence, SkewedForwardKL):
        return kl(p, mix(divergence.lam))
    if isinstance(divergence, SkewedReverseKL):
        return kl(q, mix(1 - divergence.lam))
    if isinstance(divergence, AdaptiveKL):
        order = sorted(range(len(p)), key=lambda k: p[k])
        mass, gaps = 0.0, [0.0, 0.0]
        for k in order:
            mass += p[k]
            gaps[mass > divergence.alpha] += abs(p[k] - q[k])
        weight = gaps[1] / sum(gaps)
        return weight * kl(p, q) + (1 - weight) * kl(q, p)
    return 0.5 * sum(abs(x - y) for x, y in zip(p, q, strict=True))


@every
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_definition(divergence: Divergence, temperature: float) -> None:
    teacher, student = logits(5, 40), logits(5, 40, seed=1)
    values = divergence(student, teacher, temperature)
    p, q = ((x / temperature).softmax(-1).tolist() for x in (teacher, student))
    for row in range(5):
        assert values[row].item() == pytest.approx(by_loops(divergence, p[row], q[row]), rel=1e-9)


@every
def test_gradients(divergence: Divergence) -> None:
    teacher, student = logits(3, 7), logits(3, 7, seed=1).requires_grad_()
    if not isinstance(divergence, AdaptiveKL):  # whose weight is detached on purpose
        assert torch.autograd.gradcheck(lambda x: divergence(x, teacher, 2.0), (student,))
        both = (teacher.clone().requires_grad_(), student)
        assert torch.autograd.gradcheck(lambda t, s: divergence(s, t, 1.5), both)
    for temperature in (1.0, 2.0):
        expected = divergence(student, teacher, temperature)
        (gradient,) = torch.autograd.grad(expected.sum(), student)
        for masked in (True, False):
            value, closed = divergence.value_and_grad(student.detach(), teacher, temperature, masked)
            torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(closed, gradient, rtol=1e-10, atol=1e-12)


def test_adaptive_gradient_is_that_of_the_weighted_sum() -> None:
    teacher, student = logits(4, 9), logits(4, 9, seed=1).requires_grad_()
    value = AdaptiveKL()(student, teacher)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    weight = ((value - reverse) / (forward - reverse)).detach()
    assert ((weight >= 0) & (weight <= 1)).all()
    expected = torch.autograd.grad((weight * forward + (1 - weight) * reverse).sum(), student)[0]
    torch.testing.assert_close(torch.autograd.grad(value.sum(), student)[0], expected)


def test_adaptive_takes_ties_at_the_boundary_in_part() -> None:
    # p: 1/4 four times; ascending mass 1/4 | 1/2 | 3/4 | 1 leaves any two of them in the head.
    teacher = torch.zeros(1, 4, dtype=torch.float64)
    student = logits(1, 4)
    value = AdaptiveKL(0.5)(student, teacher)
    expected = 0.5 * forward_kl(student, teacher) + 0.5 * reverse_kl(student, teacher)
    torch.testing.assert_close(value, expected)


values = st.lists(st.floats(-30, 30), min_size=2, max_size=12)


@every
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_properties(divergence: Divergence, data: st.DataObject) -> None:
    t = torch.tensor(data.draw(values), dtype=torch.float64)
    floats = st.lists(st.floats(-30, 30), min_size=len(t), max_size=len(t))
    s = torch.tensor(data.draw(floats), dtype=torch.float64)
    if isinstance(divergence, AdaptiveKL):  # jumps where the order of p does
        assume(t.sort().values.diff().min() > 1e-3)
    value = divergence(s, t)
    assert value >= -1e-12
    assert divergence(t, t).item() == pytest.approx(0.0, abs=1e-12)
    if (t.softmax(-1) - s.softmax(-1)).abs().sum() > 1e-3:
        assert value > 1e-9
    close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(divergence(s - 3.0, t + 5.0), value, **close)
    order = torch.tensor(data.draw(st.permutations(range(len(t)))))
    torch.testing.assert_close(divergence(s[order], t[order]), value, **close)
    # a token that both mask changes nothing
    pad = torch.tensor([-INF], dtype=torch.float64)
    torch.testing.assert_close(divergence(torch.cat([s, pad]), torch.cat([t, pad])), value, **close)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_logits(divergence: Divergence, dtype: torch.dtype) -> None:
    t, s = logits(6, 9).to(dtype), logits(6, 9, seed=1).to(dtype)
    t[0], s[1], t[2], s[2] = -INF, -INF, -INF, -INF  # whole rows
    t[3, 2:5], s[4, 2:5] = -INF, -INF  # one side
    t[5, 1:3], s[5, 2:8] = -INF, -INF  # overlapping
    t.requires_grad_()
    s.requires_grad_()
    value = divergence(s, t, 2.0)
    gradients = torch.autograd.grad(value.sum(), (t, s))
    assert value.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (value[:3] == 0).all()
    assert (gradients[0][3, 2:5] == 0).all()
    assert (gradients[1][4, 2:5] == 0).all()
    closed_value, closed = divergence.value_and_grad(s.detach(), t.detach(), 2.0)
    torch.testing.assert_close(closed_value, value.detach())
    torch.testing.assert_close(closed, gradients[1])


@every
def test_extreme_logits_stay_finite(divergence: Divergence) -> None:
    t = torch.tensor([[0.0, 300.0, -300.0], [1e4, 0.0, -1e4]])
    s = torch.tensor([[300.0, 0.0, -300.0], [-1e4, 0.0, 1e4]]).requires_grad_()
    value = divergence(s, t)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    closed_value, closed = divergence.value_and_grad(s.detach(), t)
    assert closed_value.isfinite().all()
    assert closed.isfinite().all()


def test_jensen_shannon_tends_to_both_kls() -> None:
    t, s = logits(4, 11), logits(4, 11, seed=1)
    for beta, scale, limit in ((1e-7, 1e-7, forward_kl), (1 - 1e-7, 1e-7, reverse_kl)):
        torch.testing.assert_close(jensen_shannon(s, t, beta=beta) / scale, limit(s, t), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(jensen_shannon(s, t, beta=0.0), forward_kl(s, t))
    torch.testing.assert_close(jensen_shannon(s, t, beta=1.0), reverse_kl(s, t))


@every
def test_shape_and_precision(divergence: Divergence) -> None:
    t, s = logits(2, 3, 8), logits(2, 3, 8, seed=1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        value = divergence(s.to(dtype), t.to(dtype))
        assert value.shape == (2, 3)
        assert value.dtype == torch.float32
    assert divergence(s, t).dtype == torch.float64


def test_own_divergence_needs_forward_only() -> None:
    class Squared(Divergence):
        def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
            p, q = ((x / temperature).softmax(-1) for x in (teacher_logits, student_logits))
            return (p - q).square().sum(-1)

    t, s = logits(3, 5), logits(3, 5, seed=1).requires_grad_()
    value, gradient = Squared().value_and_grad(s, t, 2.0)
    expected = Squared()(s, t, 2.0)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), s)[0])


class Half(ForwardKL):
    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        return 0.5 * super().forward(student_logits, teacher_logits, temperature)


class ClosedHalf(Half):
    def _pointwise(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = super()._pointwise(log_p, log_q, p, q)
        return 0.5 * value, 0.5 * gradient


class HalfAgain(ClosedHalf):
    """Changes what no closed form knows of."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        return 0.5 * super().forward(student_logits, teacher_logits, temperature)


def hooked() -> Divergence:
    divergence = ForwardKL()
    divergence.register_forward_hook(lambda module, args, output: 3 * output)
    return divergence


@pytest.mark.parametrize(
    ("divergence", "factor", "closed"),
    [(Half(), 0.5, False), (ClosedHalf(), 0.5, True), (HalfAgain(), 0.25, False), (hooked(), 3.0, False)],
)
def test_a_subclass_is_never_bypassed(divergence: Divergence, factor: float, closed: bool) -> None:
    """By a gradient in closed form, or the fused pass that reads it."""
    assert divergence.has_closed_form is closed
    t, s = logits(3, 5), logits(3, 5, seed=1)
    value, gradient = divergence.value_and_grad(s, t, 2.0)
    expected, slope = ForwardKL().value_and_grad(s, t, 2.0)
    torch.testing.assert_close(value, factor * expected)
    torch.testing.assert_close(gradient, factor * slope)
    eye = Head(torch.eye(5, dtype=torch.float64))
    fused = fused_distillation(
        s.requires_grad_(), eye, teacher_hidden=t, teacher_head=eye, divergence=divergence, temperature=2.0
    )
    torch.testing.assert_close(fused.stats["kd"], factor * expected.sum())
    torch.testing.assert_close(torch.autograd.grad(fused.loss, s)[0], factor * slope)


@every
def test_the_student_comes_first(divergence: Divergence) -> None:
    t, s = logits(3, 5), logits(3, 5, seed=1)
    torch.testing.assert_close(divergence(s, t), divergence(teacher_logits=t, student_logits=s))
    torch.testing.assert_close(ForwardKL()(s, t), ReverseKL()(t, s))


def test_bad_input() -> None:
    with pytest.raises(UserError, match="beta of a divergence must lie in"):
        JensenShannon(1.5)
    with pytest.raises(UserError, match="alpha"):
        AdaptiveKL(-0.1)
    with pytest.raises(ValueError, match="differ in shape"):
        forward_kl(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="temperature must be positive"):
        forward_kl(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)
