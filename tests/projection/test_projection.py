"""Projectors between two spaces against numpy-style pseudo-inverses in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from dskd_lightning.projection import HeadMap, LinearProjector, cross_gram, inverse_gram, map_between_heads
from dskd_lightning.structures import Head

VOCAB, SMALL, LARGE = 50, 6, 9


def heads(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(VOCAB, SMALL, dtype=dtype), torch.randn(VOCAB, LARGE, dtype=dtype)


def test_map_is_t_times_pseudo_inverse_of_s() -> None:
    student, teacher = heads()
    expected = teacher.T @ torch.linalg.pinv(student.T)
    torch.testing.assert_close(map_between_heads(teacher, student), expected)
    expected = student.T @ torch.linalg.pinv(teacher.T)
    torch.testing.assert_close(map_between_heads(student, teacher), expected)


def test_more_dimensions_than_tokens() -> None:
    student, teacher = heads()
    few = slice(4)
    expected = teacher[few].T @ torch.linalg.pinv(student[few].T)
    torch.testing.assert_close(map_between_heads(teacher[few], student[few]), expected)


def test_ill_conditioned_head_in_float32() -> None:
    student, teacher = heads()
    student = student * torch.logspace(0, -3, SMALL, dtype=torch.float64)
    expected = teacher.T @ torch.linalg.pinv(student.T)
    actual = map_between_heads(teacher.float(), student.float())
    assert (actual - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_in_blocks_untouched_by_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dskd_lightning.projection.pseudo_inverse._BLOCK", 7)
    student, teacher = heads(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = cross_gram(student, teacher)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), student.double().T @ teacher.double(), rtol=1e-4, atol=1e-4)
    assert inverse_gram(student).dtype == torch.float64


def test_different_vocabularies_need_shared_tokens() -> None:
    student, teacher = heads()
    with pytest.raises(ValueError, match="restrict them to shared tokens"):
        cross_gram(student, teacher[1:])


def test_initialised_projector_keeps_logits() -> None:
    student, teacher = heads(torch.float32)
    teacher[:, :SMALL] = student @ torch.randn(SMALL, SMALL)  # a teacher whose logits the student can express
    teacher[:, SMALL:] = 0
    hidden = torch.randn(5, LARGE)
    source, target = Head(teacher, scale=2.0), Head(student, scale=0.5)
    projector = LinearProjector.between_heads(source, target)
    assert projector.bias is None
    assert projector.weight.requires_grad
    torch.testing.assert_close(target.logits(projector(hidden)), source.logits(hidden), rtol=1e-3, atol=1e-3)


def test_initialised_on_shared_tokens() -> None:
    student, teacher = heads()
    ours, theirs = torch.tensor([3, 8, 1, 20, 30, 7, 9, 2, 4]), torch.tensor([5, 4, 9, 40, 2, 6, 1, 0, 3])
    projector = LinearProjector.between_heads(Head(teacher), Head(student), theirs, ours)
    expected = teacher[theirs].T @ torch.linalg.pinv(student[ours].T)
    torch.testing.assert_close(projector.weight.detach().T, expected)


def test_linear_projector_reads_any_dtype() -> None:
    projector = LinearProjector(LARGE, SMALL)
    assert projector.weight.dtype == torch.float32
    assert projector(torch.randn(3, LARGE).bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projector(torch.randn(3, LARGE)).dtype == torch.bfloat16


def test_head_map() -> None:
    student, teacher = heads()
    weight = torch.nn.Parameter(student)
    source, target = Head(weight, scale=3.0), Head(teacher)
    projector = HeadMap(target)
    hidden = torch.randn(4, SMALL, dtype=torch.float64, requires_grad=True)
    moved = projector(hidden, source, target)
    torch.testing.assert_close(moved, hidden @ (3 * student.T @ torch.linalg.pinv(teacher.T)))
    moved.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert not list(projector.parameters())
    assert not projector.state_dict()
    for other in (copy.deepcopy(projector), pickle.loads(pickle.dumps(projector))):
        torch.testing.assert_close(other(hidden, source, target), moved)


class Behind(torch.optim.Optimizer):
    """Writes behind a tensor's version counter, as 8-bit optimisers do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1.0)


def test_head_map_follows_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(a: Tensor, b: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return cross_gram(a, b)

    monkeypatch.setattr("dskd_lightning.projection.head_map.cross_gram", counted)
    student, teacher = heads()
    weight, target = torch.nn.Parameter(student), Head(teacher)
    projector, hidden = HeadMap(target), torch.randn(2, SMALL, dtype=torch.float64)
    inverse = torch.linalg.pinv(teacher.T)
    for _ in range(3):
        projector(hidden, Head(weight), target)
    assert calls == 1
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1).step()
    torch.testing.assert_close(
        projector(hidden, Head(weight), target), hidden @ (weight.T @ inverse).detach()
    )
    assert calls == 2
    version = weight._version
    Behind([weight], {}).step()
    assert weight._version == version
    torch.testing.assert_close(
        projector(hidden, Head(weight), target), hidden @ (weight.T @ inverse).detach()
    )
    assert calls == 3
    # weights that are made anew each step, as under LoRA on the head
    for factor in (1.0, 2.0, 3.0):
        effective = weight * factor
        expected = hidden @ (effective.T @ inverse).detach()
        torch.testing.assert_close(projector(hidden, Head(effective), target), expected)
        del effective
    assert calls == 6


def test_head_map_survives_half_precision() -> None:
    student, teacher = heads(torch.float32)
    projector = HeadMap(Head(teacher))
    expected = projector(torch.eye(SMALL), Head(student), Head(teacher))
    projector = HeadMap(Head(teacher)).to(torch.bfloat16)
    torch.testing.assert_close(projector(torch.eye(SMALL), Head(student), Head(teacher)), expected)
