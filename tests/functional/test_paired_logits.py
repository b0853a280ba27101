"""Losses on pairs of logits: tiles and chunks against whole matrices, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dskd_lightning.functional import paired_logits
from dskd_lightning.functional.paired_logits import paired_logit_sum
from dskd_lightning.structures import Head

N, M, D, E, V, U = 37, 9, 5, 7, 13, 17
POSITION = torch.tensor([(3 * i) % M if i % 4 else -1 for i in range(N)])


def loss_of(
    logits: Tensor, teacher: Tensor, paired: Tensor, rows: tuple[Tensor, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    labels, factor = rows
    ce = F.cross_entropy(logits, labels, reduction="sum")
    p, q = teacher.softmax(-1), logits[paired].softmax(-1)
    kd = ((p[:, :V] - q) ** 2 * factor[paired, None]).sum()
    return ce + kd, {"kd": kd, "pairs": paired.new_tensor(len(paired)), "choice": logits.argmax(-1)}


def make(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, ...]:
    hidden = torch.randn(n, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    factor = torch.randn(n, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, factor, torch.randint(V, (n,))


def teacher(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Head]:
    return torch.randn(M, E, dtype=dtype), Head(torch.randn(U, E, dtype=dtype), scale=0.5)


def run(
    tensors: tuple[Tensor, ...], reads: tuple[Tensor, Head], position: Tensor = POSITION, **head: float
) -> tuple[Tensor, dict[str, Tensor]]:
    hidden, weight, bias, factor, labels = tensors
    return paired_logit_sum(
        loss_of,
        (hidden, Head(weight, bias, **head)),
        reads,
        position,
        (labels, factor),
        memory_budget_mb=1e-9,  # chunks of 16 rows
        copies=8,
    )


@pytest.fixture(params=[1, 5, 1000], ids="tiles of {}".format)
def _tile(request, monkeypatch) -> None:
    monkeypatch.setattr(paired_logits, "tile_rows", lambda vocab, device: request.param)


@pytest.mark.usefixtures("_tile")
def test_values_stats_and_gradients_equal_those_of_whole_matrices() -> None:
    tensors, reads = make(), teacher()
    hidden, weight, bias, factor, labels = tensors
    loss, stats = run(tensors, reads, scale=2.0, softcap=3.0)
    paired = (POSITION >= 0).nonzero().squeeze(1)
    wanted, wanted_stats = loss_of(
        Head(weight, bias, 2.0, 3.0).logits(hidden),
        reads[1].logits(reads[0][POSITION[paired]]),
        paired,
        (labels, factor),
    )
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(stats["kd"], wanted_stats["kd"].detach())
    assert torch.equal(stats["choice"], wanted_stats["choice"])
    assert int(stats["pairs"]) == len(paired)
    leaves = (hidden, weight, bias, factor)
    for found, expected in zip(
        torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * wanted, leaves), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_gradcheck() -> None:
    tensors, reads = make(), teacher()
    leaves = tensors[:4]
    assert torch.autograd.gradcheck(lambda *x: run((*x, tensors[4]), reads)[0], leaves)


@pytest.mark.parametrize("trained", range(4))
def test_only_what_needs_a_gradient_gets_one(trained) -> None:
    tensors = tuple(x.detach().requires_grad_(i == trained) if i < 4 else x for i, x in enumerate(make()))
    run(tensors, teacher())[0].backward()
    assert [x.grad is not None for x in tensors] == [i == trained for i in range(5)]
    with torch.no_grad():
        assert not run(tensors, teacher())[0].requires_grad


def test_no_positions_and_no_pairs() -> None:
    tensors = make(n=0)
    loss, _ = run(tensors, teacher(), POSITION[:0])
    loss.backward()
    assert loss == 0
    assert not tensors[1].grad.any()
    tensors = make()
    loss, stats = run(tensors, (torch.randn(0, E).double(), teacher()[1]), torch.full((N,), -1))
    assert stats["pairs"] == 0
    ce = F.cross_entropy(Head(tensors[1], tensors[2]).logits(tensors[0]), tensors[4], reduction="sum")
    torch.testing.assert_close(loss, ce)


def test_under_autocast_products_are_half_and_the_loss_is_not() -> None:
    tensors = make(torch.float32)
    reads = teacher(torch.float32)
    seen, tiles = [], []

    def record(logits, theirs, paired, rows):
        seen.append((logits.dtype, theirs.dtype))
        tiles.append(logits.detach())
        return loss_of(logits, theirs, paired, rows)

    hidden, weight, bias, factor, labels = tensors
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = paired_logit_sum(
            record, (hidden, Head(weight, bias)), reads, POSITION, (labels, factor),
            memory_budget_mb=1024, copies=8,
        )  # fmt: skip
        plain = F.linear(hidden, weight, bias).float()
    assert set(seen) == {(torch.float32, torch.float32)}
    loss.backward()
    assert torch.equal(torch.cat(tiles), plain)
    assert weight.grad.dtype == torch.float32
