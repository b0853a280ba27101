"""Chunked sums and maps against the same function on everything at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dskd_lightning.functional import chunk_tokens, chunked_map, chunked_sum, token_argmax, token_log_prob
from dskd_lightning.functional.chunking import head_parameters
from dskd_lightning.structures import Head

TOKENS, HIDDEN, VOCAB = 11, 4, 13


def make(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(VOCAB, (TOKENS,))


def step(chunk: tuple[Any, ...], parameters: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    hidden, labels, missing = chunk
    assert missing is None
    logits = hidden @ parameters[0].T
    assert logits.shape[0] <= 4
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return loss, {"choice": logits.argmax(-1), "count": torch.tensor(len(labels)), "loss": loss}


def total(hidden: Tensor, weight: Tensor, labels: Tensor, size: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    return chunked_sum(step, (hidden, labels, None), (weight, None), chunk_size=size)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_sum_equals_whole(size: int) -> None:
    hidden, weight, labels = make()
    loss, stats = total(hidden, weight, labels, size)
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for actual, wanted in zip(
        torch.autograd.grad(3 * loss, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)
    assert torch.equal(stats["choice"], logits.argmax(-1))
    assert stats["count"] == TOKENS
    assert not stats["loss"].requires_grad


def test_sum_gradcheck_and_reuse() -> None:
    hidden, weight, labels = make()
    assert torch.autograd.gradcheck(lambda h, w: total(h, w, labels)[0] ** 2, (hidden, weight))
    loss, _ = total(hidden, weight, labels)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    second = torch.autograd.grad(loss * 2, hidden)[0]
    torch.testing.assert_close(second, 2 * first)


def test_gradients_only_where_needed() -> None:
    hidden, weight, labels = make()
    frozen = weight.detach()
    loss, _ = total(hidden, frozen, labels)
    assert [x.shape for x in loss.grad_fn.saved_tensors] == [hidden.shape]  # none for the head
    with torch.no_grad():
        loss, _ = total(hidden, weight, labels)
    assert not loss.requires_grad
    assert not total(hidden.detach(), frozen, labels)[0].requires_grad


def test_no_tokens() -> None:
    hidden, weight, labels = make()
    loss, stats = total(hidden[:0], weight, labels[:0])
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)
    assert stats["choice"].shape == (0,)

    def mean(chunk: tuple[Any, ...], _: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        return chunk[0].mean(), {}

    assert chunked_sum(mean, (hidden[:0],), chunk_size=2)[0] == 0  # not NaN
    mapped = chunked_map(lambda chunk, _: chunk[0].sum(-1), (hidden[:0],), chunk_size=2)
    assert mapped.shape == (0,)
    assert (torch.autograd.grad(mapped.sum(), hidden)[0] == 0).all()


def test_bad_calls() -> None:
    hidden, weight, labels = make()
    with pytest.raises(ValueError, match="common first dimension"):
        chunked_sum(step, (hidden, labels[:-1], None), (weight,), chunk_size=2)
    with pytest.raises(ValueError, match="scalar loss"):
        chunked_sum(lambda chunk, _: (chunk[0], {}), (hidden,), chunk_size=2)
    with pytest.raises(ValueError, match="chunk_size"):
        chunked_sum(step, (hidden, labels, None), (weight,), chunk_size=0)


def test_half_precision_parameters_accumulate_in_float32() -> None:
    ones = torch.ones(2000, 1)
    weight = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = chunked_sum(lambda c, p: ((c[0] * p[0]).sum(), {}), (ones,), (weight,), chunk_size=1)
    loss.backward()
    assert weight.grad == 2000  # a bfloat16 sum stalls at 256


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_token_log_prob(softcap: float | None) -> None:
    hidden, weight, labels = make()
    bias = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True)
    leaves = (hidden, weight, bias)

    def fused(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return token_log_prob(h, Head(w, b, 0.5, softcap), labels, temperature=2.0, chunk_size=4)

    assert torch.autograd.gradcheck(fused, leaves)
    logits = Head(weight, bias, 0.5, softcap).logits(hidden)
    expected = (logits / 2).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    torch.testing.assert_close(fused(*leaves), expected)
    assert torch.equal(
        token_argmax(hidden, Head(weight, bias), chunk_size=3), (hidden @ weight.T + bias).argmax(-1)
    )


@pytest.mark.parametrize("wrap", ["autocast", "compile", "checkpoint"])
def test_in_context(wrap: str) -> None:
    hidden, weight, labels = make(torch.float32)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        h = torch.tanh(h)
        weights = torch.linspace(0, 1, TOKENS)
        return total(h, w, labels)[0] + (weights * token_log_prob(h, Head(w), labels, chunk_size=4)).sum()

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    if wrap == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(hidden, weight)
        tolerance = {"rtol": 0.1, "atol": 0.1}
    elif wrap == "compile":
        value = torch.compile(loss, backend="eager")(hidden, weight)
    else:
        value = checkpoint(loss, hidden, weight, use_reentrant=False)
    for actual, wanted in zip(torch.autograd.grad(value, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **tolerance)


def test_chunk_tokens() -> None:
    assert chunk_tokens(152_000, 1024) * 152_000 * 4 * 8 <= 1024 * 2**20
    assert chunk_tokens(32_000, 1024) > chunk_tokens(152_000, 1024)
    assert chunk_tokens(152_000, 1024, copies=2) > chunk_tokens(152_000, 1024)
    assert chunk_tokens(10**7, 1) == 16
    assert chunk_tokens(32_000) % 16 == 0
    on_cpu = chunk_tokens(152_000, device=torch.device("cpu"))
    assert on_cpu * 152_000 * 4 <= 24 * 2**20 < (on_cpu + 16) * 152_000 * 4
    assert chunk_tokens(152_000, device=torch.device("cuda")) == chunk_tokens(152_000)
    assert chunk_tokens(32_000, 16, device=torch.device("cpu")) == chunk_tokens(32_000, 16)


def test_heads_are_cast_once_where_autocast_would() -> None:
    weight = torch.randn(VOCAB, HIDDEN, requires_grad=True)
    bias = torch.randn(VOCAB)
    assert head_parameters(Head(weight, bias)) == (weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_bias = head_parameters(Head(weight, bias))
        assert cast.dtype == torch.bfloat16
        assert cast.requires_grad
        assert cast_bias is not None
        assert cast_bias.dtype == torch.bfloat16
        assert head_parameters(Head(weight.double()))[0].dtype == torch.float64
