"""Sorted rows against PyTorch's own sort, in values and gradients."""

from __future__ import annotations

import pytest
import torch

from dskd_lightning.functional.sorting import sorted_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_equal_those_of_torch_sort(dtype: torch.dtype) -> None:
    values = torch.randn(3, 5, 701).to(dtype).requires_grad_()
    weight = torch.randn(3, 5, 701).to(dtype)
    expected = values.sort(-1).values
    (wanted,) = torch.autograd.grad((expected * weight).sum(), values)
    found = sorted_rows(values)
    (gradient,) = torch.autograd.grad((found * weight).sum(), values)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, wanted)
    with torch.no_grad():
        assert torch.equal(sorted_rows(values), expected)
    assert torch.equal(sorted_rows(values.detach()), expected)


def test_gradcheck_and_empty_rows() -> None:
    values = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sorted_rows, (values,))
    assert sorted_rows(torch.randn(0, 6)).shape == (0, 6)
    assert sorted_rows(torch.randn(2, 0, requires_grad=True)).shape == (2, 0)


def test_ties_each_have_one_gradient() -> None:
    values = torch.zeros(1, 4, requires_grad=True)
    (sorted_rows(values) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert values.grad is not None
    assert sorted(values.grad[0].tolist()) == [1.0, 2.0, 3.0, 4.0]
