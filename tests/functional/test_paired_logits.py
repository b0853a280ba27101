"""Losses on pairs of logits: tiles and chunks against whole matrices, values and gradients."""

from __future__ import annotations

import pytest
import torch
from pretended_gpu import PretendedGpu
from torch import Tensor
from torch.nn import functional as F

from dskd_lightning.functional import paired_logits
from dskd_lightning.functional.paired_logits import first_rows, paired_logit_sum
from dskd_lightning.structures import Head

N, M, D, E, V, U = 37, 9, 5, 7, 13, 17
POSITION = torch.tensor([(3 * i) % M if i % 4 else -1 for i in range(N)])


def loss_of(
    logits: Tensor, teacher: Tensor, paired: Tensor, rows: tuple[Tensor, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    labels, factor = rows
    ce = F.cross_entropy(logits, labels, reduction="sum")
    p, q = teacher.softmax(-1), logits[: len(paired)].softmax(-1)
    kd = ((p[:, :V] - q) ** 2 * factor[: len(paired), None]).sum(-1).where(paired, 0).sum()
    return ce + kd, {
        "kd": kd,
        "pairs": paired.sum(),
        "rows": paired.new_tensor(len(logits), dtype=torch.long),
    }


def by_hand(
    tensors: tuple[Tensor, ...], reads: tuple[Tensor, Head], position: Tensor, head: Head
) -> tuple[Tensor, Tensor]:
    """Loss and its KD, one position after the other."""
    hidden, _weight, _bias, factor, labels = tensors
    logits, theirs = head.logits(hidden), reads[1].logits(reads[0])
    kd = hidden.new_zeros(())
    for row, partner in enumerate(position.tolist()):
        if partner >= 0:
            p, q = theirs[partner].softmax(-1), logits[row].softmax(-1)
            kd = kd + factor[row] * ((p[:V] - q) ** 2).sum()
    return F.cross_entropy(logits, labels, reduction="sum") + kd, kd


def make(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, ...]:
    hidden = torch.randn(n, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    factor = torch.randn(n, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, factor, torch.randint(V, (n,))


def teacher(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Head]:
    return torch.randn(M, E, dtype=dtype), Head(torch.randn(U, E, dtype=dtype), scale=0.5)


def run(
    tensors: tuple[Tensor, ...],
    reads: tuple[Tensor, Head],
    position: Tensor = POSITION,
    most: int | None = None,
    **head: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    hidden, weight, bias, factor, labels = tensors
    return paired_logit_sum(
        loss_of,
        (hidden, Head(weight, bias, **head)),
        reads,
        position,
        (labels, factor),
        most=most,
        memory_budget_mb=1e-9,  # chunks of 16 rows
        copies=8,
    )


@pytest.fixture(params=[1, 5, 1000], ids="tiles of {}".format)
def _tile(request, monkeypatch) -> None:
    monkeypatch.setattr(paired_logits, "tile_rows", lambda vocab, device: request.param)


@pytest.mark.usefixtures("_tile")
def test_values_stats_and_gradients_equal_those_of_whole_matrices() -> None:
    tensors, reads = make(), teacher()
    hidden, weight, bias, factor, _labels = tensors
    loss, stats = run(tensors, reads, scale=2.0, softcap=3.0)
    wanted, kd = by_hand(tensors, reads, POSITION, Head(weight, bias, 2.0, 3.0))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(stats["kd"], kd.detach())
    assert int(stats["pairs"]) == int((POSITION >= 0).sum())
    assert int(stats["rows"]) == N
    leaves = (hidden, weight, bias, factor)
    for found, expected in zip(
        torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * wanted, leaves), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("most", [int((POSITION >= 0).sum()), 30, N, 10 * N])
@pytest.mark.parametrize("heads_first", [False, True])
def test_a_number_that_the_host_knows_to_be_enough_changes_nothing(most, heads_first) -> None:
    tensors, reads = make(), teacher()
    position = POSITION.flip(0) if heads_first else POSITION
    wanted, kd = by_hand(tensors, reads, position, Head(tensors[1], tensors[2]))
    with PretendedGpu():
        put = [tensor.detach().to("cuda").requires_grad_(tensor.requires_grad) for tensor in tensors]
        theirs = reads[0].to("cuda"), reads[1].to("cuda")
        loss, stats = run(tuple(put), theirs, position.to("cuda"), most=most)
        found = [
            x.cpu() for x in (*torch.autograd.grad(loss, put[:4]), loss.detach(), stats["kd"], stats["pairs"])
        ]
    expected = (
        *torch.autograd.grad(wanted, tensors[:4]),
        wanted.detach(),
        kd.detach(),
        (position >= 0).sum(),
    )
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right)


def test_rows_of_a_mask_come_first_in_their_order() -> None:
    mask = torch.tensor([False, True, False, True, True])
    order, count = first_rows(mask, None)
    assert order.tolist() == [1, 3, 4, 0, 2]
    assert count == first_rows(mask, 4)[1] == 3  # a CPU counts for itself
    with PretendedGpu() as gpu:
        on_device = mask.to("cuda")
        gpu.stalls.clear()
        assert first_rows(on_device, 4)[1] == 4
        assert first_rows(on_device, 9)[1] == 5
        assert not gpu.stalls
        assert first_rows(on_device, None)[1] == 3
        assert gpu.stalls


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
    assert torch.equal(torch.cat(tiles), plain[(POSITION < 0).to(torch.uint8).argsort(stable=True)])
    assert weight.grad.dtype == torch.float32
