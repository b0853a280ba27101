from __future__ import annotations

import numpy as np
import pytest
import torch

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.representation import (
    cosine_structure_distance,
    inner_product_structure_distance,
    linear_cka,
)
from dskd_lightning.functional.spectrum import effective_rank, singular_values


def test_distances_against_loops() -> None:
    student, teacher = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 7, dtype=torch.float64)
    s, t = student.numpy(), teacher.numpy()
    cosine, inner = [], []
    for i in range(5):
        row = 0.0
        for j in range(5):
            cosine.append(abs(_cos(s[i], s[j]) - _cos(t[i], t[j])))
            ours = s[i] @ s[j] / sum(s[i] @ s[k] for k in range(5))
            theirs = t[i] @ t[j] / sum(t[i] @ t[k] for k in range(5))
            row += abs(ours - theirs)
        inner.append(row)
    assert float(cosine_structure_distance(student, teacher)) == pytest.approx(np.mean(cosine))
    assert float(inner_product_structure_distance(student, teacher)) == pytest.approx(np.mean(inner))


def _cos(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_rotation_and_scale_change_nothing() -> None:
    hidden = torch.randn(9, 4, dtype=torch.float64)
    rotated = 3 * hidden @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    assert float(cosine_structure_distance(hidden, rotated)) == pytest.approx(0, abs=1e-12)
    assert float(inner_product_structure_distance(hidden, rotated)) == pytest.approx(0, abs=1e-9)
    assert float(linear_cka(hidden, rotated)) == pytest.approx(1)


def test_cka_against_centred_kernels() -> None:
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 6, dtype=torch.float64)
    centre = torch.eye(12, dtype=torch.float64) - 1 / 12
    k, m = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert float(linear_cka(x, y)) == pytest.approx(float(expected))


def test_singular_values_and_collapse() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    torch.testing.assert_close(singular_values(weight), torch.tensor([3.0, 2.0, 1.0]))
    assert float(effective_rank(torch.eye(8))) == pytest.approx(8, rel=1e-5)
    assert float(effective_rank(torch.ones(8, 8))) == pytest.approx(1, abs=1e-3)


def test_different_token_counts() -> None:
    with pytest.raises(UserError, match="same tokens"):
        cosine_structure_distance(torch.rand(4, 2), torch.rand(5, 2))
