"""The fused pass against full logits and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dskd_lightning.functional import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    TotalVariation,
    fused_distillation,
)
from dskd_lightning.functional._softmax_rows import row_max
from dskd_lightning.functional._tiles import tile_rows
from dskd_lightning.structures import Head

N, D_S, D_T, V = 13, 6, 7, 31


class OwnDivergence(Divergence):
    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        p, q = ((x / temperature).softmax(-1) for x in (teacher_logits, student_logits))
        return (p.sqrt() - q.sqrt()).square().sum(-1)


DIVERGENCES = [
    ForwardKL(),
    ReverseKL(),
    JensenShannon(0.3),
    SkewedForwardKL(),
    SkewedReverseKL(),
    AdaptiveKL(),
    TotalVariation(),
    OwnDivergence(),
]


class Case:
    """Random leaves of one pass, and the pass both ways."""

    def __init__(self, dtype: torch.dtype = torch.float64, teacher_vocab: int = V, bias: bool = True) -> None:
        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype).requires_grad_()

        self.hidden, self.weight, self.other = leaf(N, D_S), leaf(V, D_S), leaf(N, D_T)
        self.bias = leaf(V) if bias else None
        self.teacher_weight = leaf(teacher_vocab, D_T)
        vocab = min(V, teacher_vocab)
        self.labels, self.teacher_labels = torch.randint(vocab, (N,)), torch.randint(vocab, (N,))
        self.labels[2], self.teacher_labels[3] = -100, -1
        self.mask = torch.rand(N, dtype=dtype)
        with torch.no_grad():
            agreeing = (self.other @ self.teacher_weight.T)[:, :vocab].argmax(-1)
        self.teacher_labels[6:] = agreeing[6:]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias, self.other) if x is not None]

    def heads(self) -> tuple[Head, Head]:
        return Head(self.weight, self.bias, 0.7, 4.0), Head(self.teacher_weight, None, 1.2)

    def fused(self, divergence: Divergence, temperature: float, **settings: Any) -> Any:
        student, teacher = self.heads()
        return fused_distillation(
            self.hidden,
            student,
            labels=self.labels,
            ce_weight=0.3,
            teacher_hidden=self.other,
            teacher_head=teacher,
            teacher_labels=self.teacher_labels,
            teacher_ce_weight=torch.tensor(0.6, dtype=self.hidden.dtype),
            divergence=divergence,
            temperature=temperature,
            kd_weight=0.9,
            kd_mask=self.mask,
            agreeing_only=True,
            **settings,
        )

    def naive(self, divergence: Divergence, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        student, teacher = self.heads()
        s, t = student.logits(self.hidden), teacher.detach().logits(self.other)
        shared = min(s.shape[1], t.shape[1])
        ce = F.cross_entropy(s, self.labels, ignore_index=-100, reduction="sum")
        teacher_ce = F.cross_entropy(t, self.teacher_labels, ignore_index=-1, reduction="sum")
        agree = self.mask * (t.argmax(-1) == self.teacher_labels)
        kd = (agree * divergence(s[:, :shared], t.detach()[:, :shared], temperature)).sum()
        stats = {"ce": ce, "teacher_ce": teacher_ce, "kd": kd}
        stats["student_choice"], stats["teacher_choice"] = s.argmax(-1), t.argmax(-1)
        stats["student_entropy"] = torch.distributions.Categorical(logits=s).entropy().sum()
        stats["teacher_entropy"] = torch.distributions.Categorical(logits=t).entropy().sum()
        stats["teacher_confidence"] = (t.softmax(-1).amax(-1) * (self.teacher_labels >= 0)).sum()
        return 0.3 * ce + 0.6 * teacher_ce + 0.9 * kd, stats


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize(("temperature", "chunk"), [(2.0, 4), (1.0, 100), (1.7, 13)])
def test_equals_naive(divergence: Divergence, temperature: float, chunk: int) -> None:
    case = Case()
    fused = case.fused(divergence, temperature, chunk_size=chunk)
    loss, stats = case.naive(divergence, temperature)
    torch.testing.assert_close(fused.loss, loss)
    assert fused.stats.keys() == stats.keys()
    for name, value in stats.items():
        torch.testing.assert_close(fused.stats[name], value.detach())
    for actual, expected in zip(
        torch.autograd.grad(3 * fused.loss, case.leaves),
        torch.autograd.grad(3 * loss, case.leaves),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon()], ids=repr)
def test_gradcheck(divergence: Divergence) -> None:
    case = Case(bias=False)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_distillation(
            hidden,
            Head(weight),
            labels=case.labels,
            teacher_hidden=case.other.detach(),
            teacher_head=Head(case.teacher_weight),
            divergence=divergence,
            temperature=2.0,
            chunk_size=5,
        ).loss

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight))


@pytest.mark.parametrize("teacher_vocab", [V - 3, V + 5])
def test_padded_vocabularies(teacher_vocab: int) -> None:
    case = Case(teacher_vocab=teacher_vocab)
    fused, (loss, _) = case.fused(ReverseKL(), 2.0, chunk_size=4), case.naive(ReverseKL(), 2.0)
    torch.testing.assert_close(fused.loss, loss)
    for actual, expected in zip(
        torch.autograd.grad(fused.loss, case.leaves), torch.autograd.grad(loss, case.leaves), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_float32_in_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dskd_lightning.functional._tiles._TILE_BYTES", 4 * V * 2)
    assert tile_rows(V, torch.device("cpu")) == 2
    case = Case(torch.float32)
    for divergence in DIVERGENCES:
        fused, (loss, _) = case.fused(divergence, 2.0, chunk_size=5), case.naive(divergence, 2.0)
        torch.testing.assert_close(fused.loss, loss)
        for actual, expected in zip(
            torch.autograd.grad(fused.loss, case.leaves), torch.autograd.grad(loss, case.leaves), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_masked_vocabulary() -> None:
    case = Case()
    assert case.bias is not None
    with torch.no_grad():
        case.bias[[4, 9]] = -float("inf")
    for labels in (case.labels, case.teacher_labels):
        labels[(labels == 4) | (labels == 9)] = 5
    student, teacher = Head(case.weight, case.bias), Head(case.teacher_weight)
    for divergence in DIVERGENCES:
        if isinstance(divergence, OwnDivergence):
            continue  # it knows nothing of masks
        fused = fused_distillation(
            case.hidden,
            student,
            labels=case.labels,
            teacher_hidden=case.other,
            teacher_head=teacher,
            divergence=divergence,
            temperature=2.0,
        )
        s, t = student.logits(case.hidden), teacher.logits(case.other).detach()
        expected = (
            F.cross_entropy(s, case.labels, ignore_index=-100, reduction="sum") + divergence(s, t, 2.0).sum()
        )
        torch.testing.assert_close(fused.loss, expected)
        (actual,), (wanted,) = (torch.autograd.grad(x, case.hidden) for x in (fused.loss, expected))
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, wanted)
        assert fused.stats["student_entropy"].isfinite()


def test_no_gradient_that_is_not_needed() -> None:
    case = Case()
    for tensor in (case.weight, case.bias, case.other):
        assert tensor is not None
        tensor.requires_grad_(False)
    fused = case.fused(ForwardKL(), 2.0, chunk_size=4)
    assert [tuple(x.shape) for x in fused.loss.grad_fn.saved_tensors] == [(N, D_S)]
    with torch.no_grad():
        quiet = case.fused(ForwardKL(), 2.0, chunk_size=4)
    assert not quiet.loss.requires_grad
    torch.testing.assert_close(quiet.loss, fused.loss.detach())
    assert case.teacher_weight.grad is None


def test_used_twice() -> None:
    case = Case()
    fused = case.fused(ForwardKL(), 2.0, chunk_size=4)
    first = torch.autograd.grad(fused.loss, case.hidden, retain_graph=True)[0].clone()
    fused.loss.backward()
    fused.loss.detach()
    torch.testing.assert_close(case.hidden.grad, first)
    both = case.fused(ForwardKL(), 2.0).loss + 2 * case.fused(ForwardKL(), 2.0).loss
    torch.testing.assert_close(torch.autograd.grad(both, case.hidden)[0], 3 * first)


def test_no_tokens() -> None:
    case = Case(torch.float32)
    student, teacher = case.heads()
    fused = fused_distillation(
        case.hidden[:0],
        student,
        labels=case.labels[:0],
        teacher_hidden=case.other[:0],
        teacher_head=teacher,
        teacher_labels=case.labels[:0],
        divergence=AdaptiveKL(),
    )
    assert fused.loss == 0
    for gradient in torch.autograd.grad(fused.loss, case.leaves):
        assert (gradient == 0).all()
    full = case.fused(AdaptiveKL(), 2.0)
    assert full.stats.keys() == fused.stats.keys()


def test_lora_on_a_tied_head() -> None:
    embeddings = torch.randn(V, D_S, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, D_S, dtype=torch.float64, requires_grad=True)
    b = torch.randn(V, 2, dtype=torch.float64, requires_grad=True)
    ids, labels = torch.randint(V, (N,)), torch.randint(V, (N,))

    def loss(fused: bool) -> Tensor:
        hidden = torch.tanh(embeddings[ids])
        weight = embeddings + b @ a
        if fused:
            return fused_distillation(hidden, Head(weight), labels=labels, chunk_size=4).loss
        return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")

    for actual, expected in zip(
        torch.autograd.grad(loss(True), (embeddings, a, b)),
        torch.autograd.grad(loss(False), (embeddings, a, b)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("wrap", ["autocast", "compile", "checkpoint"])
def test_in_context(wrap: str) -> None:
    case = Case(torch.float32)

    def loss(hidden: Tensor, fused: bool = True) -> Tensor:
        case.hidden = torch.tanh(hidden)
        return case.fused(ForwardKL(), 2.0, chunk_size=4).loss if fused else case.naive(ForwardKL(), 2.0)[0]

    hidden = torch.randn(N, D_S, requires_grad=True)
    leaves = [hidden, case.weight, case.other]
    expected = torch.autograd.grad(loss(hidden, False), leaves)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    if wrap == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(hidden)
        tolerance = {"rtol": 0.05, "atol": 0.1}
    elif wrap == "compile":
        value = torch.compile(loss, backend="eager")(hidden)
    else:
        value = checkpoint(loss, hidden, use_reentrant=False)
    for actual, wanted in zip(torch.autograd.grad(value, leaves), expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, wanted, **tolerance)


def test_bfloat16_models() -> None:
    case = Case(torch.float32, bias=False)
    loss, _ = case.naive(ForwardKL(), 2.0)
    expected = torch.autograd.grad(loss, case.leaves)
    for name in ("hidden", "weight", "other", "teacher_weight"):
        setattr(case, name, getattr(case, name).detach().bfloat16().requires_grad_())
    fused = case.fused(ForwardKL(), 2.0, chunk_size=4)
    assert fused.loss.dtype == torch.float32
    torch.testing.assert_close(fused.loss, loss, rtol=0.05, atol=0.5)
    for actual, wanted in zip(torch.autograd.grad(fused.loss, case.leaves), expected, strict=True):
        assert actual.dtype == torch.bfloat16
        assert F.cosine_similarity(actual.float().flatten(), wanted.flatten(), dim=0) > 0.98


def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = nn.Linear(D_S, D_S), nn.Linear(D_S, V, bias=False)

            def forward(self, x: Tensor, labels: Tensor) -> Tensor:
                return fused_distillation(
                    self.body(x), Head(self.head.weight), labels=labels, chunk_size=4
                ).loss

        model = Model()
        x, labels = torch.randn(N, D_S), torch.randint(V, (N,))
        nn.parallel.DistributedDataParallel(model)(x, labels).backward()
        expected = torch.autograd.grad(
            F.cross_entropy(model.head(model.body(x)), labels, reduction="sum"), list(model.parameters())
        )
        for parameter, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, wanted)
    finally:
        torch.distributed.destroy_process_group()


class _MostLogits(torch.utils._python_dispatch.TorchDispatchMode):
    """The most rows that a tensor of the vocabulary's width has."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and value.shape[1:] == (V,) and len(value) not in (D_S, D_T):
                self.rows = max(self.rows, value.shape[0])
        return result


def test_logits_of_one_chunk_only() -> None:
    """No tensor of more than a chunk of logits is made, forward or backward."""
    case = Case(torch.float32)
    with _MostLogits() as most:
        case.fused(AdaptiveKL(), 2.0, chunk_size=3).loss.backward()
    assert 0 < most.rows <= 3


def test_a_chunk_of_a_cpu_is_small_whatever_the_budget() -> None:
    hidden, head = torch.randn(1100, D_S), Head(torch.randn(V, D_S))
    with _MostLogits() as most:
        fused_distillation(hidden, head, labels=torch.zeros(1100, dtype=torch.long), memory_budget_mb=4096)
    assert most.rows == 512


@pytest.mark.parametrize("vocab", [5, 1023, 1024, 1500, 2049])
def test_row_max_equals_plain(vocab: int) -> None:
    values = torch.randint(-50, 50, (40, vocab)).float()  # with ties
    top, index = row_max(values)
    expected = values.max(-1)
    assert torch.equal(top, expected.values)
    first = (values == top.unsqueeze(-1)).int().argmax(-1)
    assert torch.equal(index, first)


def test_bad_calls() -> None:
    hidden, head, labels = torch.zeros(3, 2), Head(torch.zeros(5, 2)), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="together"):
        fused_distillation(hidden, head, labels=labels, teacher_hidden=hidden)
    with pytest.raises(ValueError, match="a divergence needs"):
        fused_distillation(hidden, head, divergence=ForwardKL())
    with pytest.raises(ValueError, match="hidden states, labels and masks"):
        fused_distillation(hidden, head, labels=labels[:2])
    with pytest.raises(ValueError, match="agreeing_only needs"):
        fused_distillation(hidden, head, teacher_hidden=hidden, teacher_head=head, agreeing_only=True)
