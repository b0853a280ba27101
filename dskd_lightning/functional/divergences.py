r"""Divergences ``D(p || q)`` between a teacher's and a student's next-token distributions.

Every divergence is a pure function of logits, differentiable in both arguments by autograd, and
a small module whose :meth:`Divergence.value_and_grad` has the gradient in closed form. With
``l = log q`` all of them are sums :math:`D = \sum_k f(\log p_k, l_k)`, so that

.. math:: \partial D / \partial s_k = (g_k - q_k \sum_j g_j) / \tau, \quad g_k = \partial f / \partial l_k

for student logits ``s`` and temperature ``tau``. A module states only ``f`` and ``g``.

Computed in float32 (float64 stays). A token whose logit is ``-inf`` on either side is masked:
it contributes 0 to the value and receives no gradient from it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dskd_lightning.described import Described
from dskd_lightning.errors import UserError
from dskd_lightning.functional.precision import wide

__all__ = [
    "AdaptiveKL",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "ReverseKL",
    "SkewedForwardKL",
    "SkewedReverseKL",
    "TotalVariation",
    "adaptive_kl",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
]


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities; a row that is masked throughout becomes uniform instead of NaN."""
    logits = wide(logits)
    logits = logits.masked_fill(torch.isneginf(logits).all(-1, keepdim=True), 0.0)
    return torch.log_softmax(logits / temperature if temperature != 1.0 else logits, dim=-1)


def _distributions(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """``(log p, log q, p, q)``, with zeros in place of all four where either side is masked."""
    _check(student_logits, teacher_logits, temperature)
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    masked = torch.isneginf(teacher_logits) | torch.isneginf(student_logits)
    p, q = log_p.exp().masked_fill(masked, 0.0), log_q.exp().masked_fill(masked, 0.0)
    return log_p.masked_fill(masked, 0.0), log_q.masked_fill(masked, 0.0), p, q


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher logits {tuple(teacher_logits.shape)} and student logits "
            f"{tuple(student_logits.shape)} differ in shape"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")


def _through_softmax(gradient: Tensor, q: Tensor, temperature: float) -> Tensor:
    """Gradient to the logits of ``q``, given that to ``log q``; overwrites both."""
    gradient.sub_(q.mul_(gradient.sum(-1, keepdim=True)))
    return gradient if temperature == 1.0 else gradient.mul_(1 / temperature)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """``log(share p + (1 - share) q)`` without underflow."""
    if share in (0.0, 1.0):
        return (log_p if share else log_q).clone()  # callers overwrite their arguments
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(p || q)`` of logits ``[..., vocab]``, per token ``[...]``."""
    log_p, log_q, p, _ = _distributions(student_logits, teacher_logits, temperature)
    return (p * (log_p - log_q)).sum(-1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(q || p)`` of logits ``[..., vocab]``, per token ``[...]``."""
    log_p, log_q, _, q = _distributions(student_logits, teacher_logits, temperature)
    return (q * (log_q - log_p)).sum(-1)


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649), per token ``[...]``.

    ``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``. Divided by
    ``beta`` (by ``1 - beta``) it tends to the forward (reverse) KL as ``beta`` tends to 0 (1);
    at exactly 0 and 1 those KLs are returned, as in GKD.
    """
    if beta == 0.0:
        return forward_kl(student_logits, teacher_logits, temperature)
    if beta == 1.0:
        return reverse_kl(student_logits, teacher_logits, temperature)
    log_p, log_q, p, q = _distributions(student_logits, teacher_logits, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def skewed_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, lam: float = 0.1
) -> Tensor:
    """``KL(p || lam p + (1 - lam) q)`` (DistiLLM, arXiv 2402.03898), per token ``[...]``."""
    log_p, log_q, p, _ = _distributions(student_logits, teacher_logits, temperature)
    return (p * (log_p - _log_mixture(log_p, log_q, lam))).sum(-1)


def skewed_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, lam: float = 0.1
) -> Tensor:
    """``KL(q || (1 - lam) p + lam q)`` (DistiLLM, arXiv 2402.03898), per token ``[...]``."""
    log_p, log_q, _, q = _distributions(student_logits, teacher_logits, temperature)
    return (q * (log_q - _log_mixture(log_q, log_p, lam))).sum(-1)


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, alpha: float = 0.5
) -> Tensor:
    """Forward and reverse KL weighted by where the two disagree (arXiv 2404.02657), per token ``[...]``.

    The weight of the forward KL is the share of ``|p - q|`` on the head of ``p``: all but the
    least likely tokens that hold at most ``alpha`` of its mass. It gets no gradient.
    """
    log_p, log_q, p, q = _distributions(student_logits, teacher_logits, temperature)
    weight = _head_weight(p.detach(), q.detach(), alpha)
    log_ratio = log_p - log_q
    return weight * (p * log_ratio).sum(-1) - (1 - weight) * (q * log_ratio).sum(-1)


def total_variation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``0.5 sum |p - q|`` of logits ``[..., vocab]``, per token ``[...]``."""
    _, _, p, q = _distributions(student_logits, teacher_logits, temperature)
    return 0.5 * (p - q).abs().sum(-1)


def _head_weight(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    """Share ``[...]`` of ``|p - q|`` that lies on the head of ``p`` (:func:`adaptive_kl`).

    Sorted ascending, an entry is in the tail while the mass up to it is at most ``alpha``; that is,
    it is in the head while the mass of all *larger* entries is below ``bound = total - alpha``.
    No sort: bisection over the floating-point numbers, whose bit patterns are ordered as they
    are, finds the smallest entry of the head. Entries equal to it belong to the head in part;
    which of them is arbitrary, so that their mean gap stands for theirs.
    """
    bound = p.sum(-1, keepdim=True) - alpha
    integer, steps = (torch.int64, 63) if p.dtype == torch.float64 else (torch.int32, 31)
    high = p.amax(-1, keepdim=True).view(integer) + 1
    low = torch.zeros_like(high)
    work = torch.empty_like(p)  # comparisons as 0. and 1.: boolean masks are several times slower
    for _ in range(steps):  # mass(p >= low) >= bound > mass(p >= high)
        middle = low + (high - low) // 2
        mass = torch.ge(p, middle.view(p.dtype), out=work).mul_(p).sum(-1, keepdim=True)
        enough = mass >= bound
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    threshold, tiny = low.view(p.dtype), torch.finfo(p.dtype).tiny
    gap = torch.sub(p, q).abs_()
    tied = torch.eq(p, threshold, out=work).sum(-1, keepdim=True)
    tied_gap = work.mul_(gap).sum(-1, keepdim=True)
    above = torch.gt(p, threshold, out=work)
    missing = bound - torch.linalg.vecdot(above, p).unsqueeze(-1)
    taken = (missing / threshold.clamp(min=tiny)).ceil().clamp(min=0).minimum(tied)
    head_gap = above.mul_(gap).sum(-1, keepdim=True) + tied_gap * taken / tied.clamp(min=1)
    return head_gap.squeeze(-1) / gap.sum(-1).clamp(min=tiny)


class Divergence(Described, nn.Module):
    """A divergence between student and teacher logits over one vocabulary.

    Write your own by overriding :meth:`forward` alone, with these names of its arguments, by which it is
    called; override :meth:`_pointwise` too and the fused losses use your closed-form gradient instead of
    autograd.
    """

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Divergence per token.

        Args:
            student_logits: ``[..., vocab]``.
            teacher_logits: ``[..., vocab]``; detach them unless they shall have a gradient.
            temperature: divides both sides' logits.

        Returns:
            ``[...]``, float32 or float64.
        """
        raise NotImplementedError

    @property
    def has_closed_form(self) -> bool:
        """Whether the gradient is known without autograd, of this very `forward`: no subclass or hook has
        changed what it computes."""
        if "forward" in vars(self) or self._forward_hooks or self._forward_pre_hooks:
            return False
        own = next(kind for kind in type(self).__mro__ if {"forward", "_pointwise"} & vars(kind).keys())
        return own is not Divergence and "_pointwise" in vars(own)

    def _pointwise(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """``(f, df / d log q)``, where the divergence is the sum of ``f`` over the vocabulary.

        ``f`` may be reduced already (``[..., 1]``). The arguments may be overwritten, but for ``q``.
        """
        raise NotImplementedError

    @torch.no_grad()
    def value_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, masked: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Divergence per token and its gradient to the student logits.

        Args:
            student_logits: ``[tokens, vocab]``.
            teacher_logits: ``[tokens, vocab]``.
            temperature: divides both sides' logits.
            masked: whether there may be ``-inf`` among the logits; False saves the search for them.

        Returns:
            Value ``[tokens]`` and gradient ``[tokens, vocab]``, float32 or float64.
        """
        _check(student_logits, teacher_logits, temperature)
        if not self.has_closed_form:
            return self._value_and_autograd(student_logits, teacher_logits, temperature)
        if masked:
            masked = bool(torch.isneginf(teacher_logits).any() or torch.isneginf(student_logits).any())
        if masked:
            # q of tokens that only the teacher masks still moves with the student's logits.
            log_p, log_q, p, q_visible = _distributions(student_logits, teacher_logits, temperature)
            q = _log_softmax(student_logits, temperature).exp_()
        else:
            log_p = torch.log_softmax(wide(teacher_logits) / temperature, dim=-1)
            log_q = torch.log_softmax(wide(student_logits) / temperature, dim=-1)
            p, q = log_p.exp(), log_q.exp()
            q_visible = q
        value, gradient = self._pointwise(log_p, log_q, p, q_visible)
        return value.sum(-1), _through_softmax(gradient, q, temperature)

    @torch.no_grad()
    def value_and_grad_of(
        self, *, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`value_and_grad`, given both distributions, which are overwritten.

        Args:
            log_p: ``[tokens, vocab]``, the teacher's log-probabilities at ``temperature``, all finite.
            log_q: the student's.
            p: the exponentials of ``log_p``.
            q: the exponentials of ``log_q``.
            temperature: that the student's logits were divided by.
        """
        value, gradient = self._pointwise(log_p, log_q, p, q)
        return value.sum(-1), _through_softmax(gradient, q, temperature)

    def _value_and_autograd(
        self, student_logits: Tensor, teacher_logits: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            logits = wide(student_logits).detach().requires_grad_()
            value = self(
                student_logits=logits, teacher_logits=teacher_logits.detach(), temperature=temperature
            )
            (grad,) = torch.autograd.grad(value.sum(), logits)
        return value.detach(), grad


class ForwardKL(Divergence):
    """:func:`forward_kl`: covers all that the teacher finds likely."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        return forward_kl(student_logits, teacher_logits, temperature)

    def _pointwise(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        value = log_p.sub_(log_q).mul_(p)
        return value, p.neg_()


class ReverseKL(Divergence):
    """:func:`reverse_kl`: avoids all that the teacher finds unlikely."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        return reverse_kl(student_logits, teacher_logits, temperature)

    def _pointwise(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        value = log_q.sub_(log_p).mul_(q)
        return value, value + q


class JensenShannon(Divergence):
    """:func:`jensen_shannon`.

    Args:
        beta: weight of the teacher in the mixture, in [0, 1].
    """

    def __init__(self, beta: float = 0.5) -> None:
        super().__init__()
        self.beta = _unit("beta", beta)

    def extra_repr(self) -> str:
        return f"beta={self.beta}"

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        return jensen_shannon(student_logits, teacher_logits, temperature, self.beta)

    def _pointwise(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        if self.beta == 0.0:
            return ForwardKL()._pointwise(log_p, log_q, p, q)
        if self.beta == 1.0:
            return ReverseKL()._pointwise(log_p, log_q, p, q)
        log_m = _log_mixture(log_p, log_q, self.beta)
        grad = log_q.sub_(log_m).mul_(q).mul_(1 - self.beta)
        return log_p.sub_(log_m).mul_(p).mul_(self.beta).add_(grad), grad


class SkewedForwardKL(Divergence):
    """:func:`skewed_forward_kl`.

    Args:
        lam: share of the teacher mixed into the student, in [0, 1].
    """

    def __init__(self, lam: float = 0.1) -> None:
        super().__init__()
        self.lam = _unit("lam", lam)

    def extra_repr(self) -> str:
        return f"lam={self.lam}"

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        return skewed_forward_kl(student_logits, teacher_logits, temperature, self.lam)

    def _pointwise(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = _log_mixture(log_p, log_q, self.lam)
        # p (1 - lam) q / m, in logs because m may underflow
        grad = log_q.sub_(log_m).exp_().mul_(p).mul_(self.lam - 1)
        return log_p.sub_(log_m).mul_(p), grad


class SkewedReverseKL(Divergence):
    """:func:`skewed_reverse_kl`.

    Args:
        lam: share of the student mixed into the teacher, in [0, 1].
    """

    def __init__(self, lam: float = 0.1) -> None:
        super().__init__()
        self.lam = _unit("lam", lam)

    def extra_repr(self) -> str:
        return f"lam={self.lam}"

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        return skewed_reverse_kl(student_logits, teacher_logits, temperature, self.lam)

    def _pointwise(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        log_ratio = log_q.sub_(_log_mixture(log_q, log_p, self.lam))
        value = log_ratio * q
        # q (log q - log m + 1 - lam q / m)
        return value, torch.add(value, log_ratio.exp_().mul_(-self.lam).add_(1).mul_(q))


class AdaptiveKL(Divergence):
    """:func:`adaptive_kl`.

    Args:
        alpha: mass of the teacher's distribution that counts as its tail, in [0, 1].
    """

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = _unit("alpha", alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        return adaptive_kl(student_logits, teacher_logits, temperature, self.alpha)

    def _pointwise(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        weight = _head_weight(p, q, self.alpha).unsqueeze(-1)
        log_ratio = log_p.sub_(log_q)
        forward = (p * log_ratio).sum(-1, keepdim=True)
        # w (-p) + (1 - w) q (1 - log ratio), and the reverse KL is minus the sum of q log ratio
        grad = log_ratio.mul_(q)
        reverse = -grad.sum(-1, keepdim=True)
        grad.neg_().add_(q).mul_(1 - weight).sub_(p.mul_(weight))
        return weight * forward + (1 - weight) * reverse, grad


class TotalVariation(Divergence):
    """:func:`total_variation`: bounded by 1."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        return total_variation(student_logits, teacher_logits, temperature)

    def _pointwise(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        gap = torch.sub(q, p, out=log_p)
        grad = torch.sign(gap).mul_(q).mul_(0.5)
        return gap.abs_().mul_(0.5), grad


def _unit(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise UserError(
            f"{name} of a divergence must lie in [0, 1], not {value}; choose a value between them."
        )
    return value
