"""Projectors whose input has unit root mean square in every dimension."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from dskd_lightning.projection import LinearProjector
from dskd_lightning.structures import Head

SIZES = torch.tensor([0.1, 1.0, 3.0, 70.0, 0.0])


def hidden(seed: int, rows: int = 40) -> Tensor:
    return torch.randn(rows, len(SIZES), generator=torch.Generator().manual_seed(seed)) * SIZES


def test_the_output_at_first_is_that_of_the_unscaled_projector() -> None:
    torch.manual_seed(0)
    plain = LinearProjector(5, 3)
    scaled = LinearProjector(5, 3, scale_inputs=True)
    scaled.load_state_dict({**scaled.state_dict(), **plain.state_dict()})
    batch = hidden(1)
    torch.testing.assert_close(scaled(batch), plain(batch))
    torch.testing.assert_close(scaled(hidden(2)), plain(hidden(2)))
    unflat = LinearProjector(5, 3, scale_inputs=True)
    unflat(batch.reshape(4, 10, 5))
    torch.testing.assert_close(unflat.input_rms, scaled.input_rms)
    expected = batch.square().mean(0).sqrt()
    floor = 1e-3 * expected.mean()
    torch.testing.assert_close(scaled.input_rms, expected.clamp(min=float(floor)))
    torch.testing.assert_close(scaled.weight, plain.weight * scaled.input_rms)
    torch.testing.assert_close(scaled.matrix, plain.weight)


def test_one_step_of_adam_moves_every_dimensions_share_alike() -> None:
    """Unscaled, the dimension of size 70 takes nearly all of the change of the output."""
    shares = {}
    for scale in (False, True):
        torch.manual_seed(0)
        projector = LinearProjector(5, 3, bias=False, scale_inputs=scale)
        batch = hidden(1)
        before = projector.matrix.detach().clone() if not scale else None
        loss = projector(batch).square().sum()
        before = projector.matrix.detach().clone() if before is None else before
        optimizer = torch.optim.Adam(projector.parameters(), lr=1e-3)
        loss.backward()
        optimizer.step()
        moved = (projector.matrix.detach() - before).abs().mean(0) * batch.square().mean(0).sqrt()
        shares[scale] = moved[:4] / moved[:4].max()
    assert shares[False][0] < 0.01
    torch.testing.assert_close(shares[True], torch.ones(4), rtol=1e-3, atol=0)


def test_a_whole_step_is_measured_alike_in_any_number_of_batches() -> None:
    torch.manual_seed(0)
    one = LinearProjector(5, 3, scale_inputs=True)
    many = copy.deepcopy(one)
    at_once = copy.deepcopy(one)
    batches = [hidden(seed, rows) for seed, rows in ((1, 3), (2, 50), (3, 9))]
    for projector, parts in ((one, [torch.cat(batches)]), (many, batches)):
        projector.measure_whole_step()
        for part in parts:
            projector(part).square().sum().backward()
        projector.settle()
    at_once(torch.cat(batches)).square().sum().backward()
    for other in (many, at_once):
        for ours, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(one.weight.grad, other.weight.grad)


def test_measured_once_in_training_and_kept() -> None:
    projector = LinearProjector(5, 3, scale_inputs=True)
    projector.eval()(hidden(1))
    projector.train()
    with torch.no_grad():
        projector(hidden(1))
    assert not projector.input_rms.any()
    projector(hidden(1)[:0])
    assert not projector.input_rms.any()
    projector(hidden(1))
    kept = {name: value.clone() for name, value in projector.state_dict().items()}
    projector(hidden(2) * 100)
    again = LinearProjector(5, 3, scale_inputs=True)
    again.load_state_dict(kept)
    again(hidden(3))
    for name, value in again.state_dict().items():
        assert torch.equal(value, kept[name])
        assert torch.equal(value, projector.state_dict()[name])


@pytest.mark.parametrize("scale", [False, True])
def test_heads_keep_their_logits(scale: bool) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(30, 4), torch.randn(30, 6)
    teacher[:, :4], teacher[:, 4:] = student @ torch.randn(4, 4), 0
    projector = LinearProjector.between_heads(Head(teacher), Head(student), scale_inputs=scale)
    batch = torch.randn(7, 6) * torch.tensor([50.0, 1, 1, 1, 1, 0.1])
    expected = Head(teacher).logits(batch)
    torch.testing.assert_close(Head(student).logits(projector(batch)), expected, rtol=1e-3, atol=1e-3)
    assert projector.waits is False
