"""The teacher's own likelihood beside the student's, against float64."""

from __future__ import annotations

import pytest
import torch

from dskd_lightning.structures import Head, Side
from dskd_lightning.training.fidelity import fidelity


def side(rows: int, hidden: int, seed: int) -> Side:
    generator = torch.Generator().manual_seed(seed)
    return Side(
        hidden=torch.randn(rows, hidden, generator=generator),
        head=Head(torch.randn(11, hidden, generator=generator)),
        embeddings=torch.zeros(11, hidden),
        ids=torch.zeros(rows, dtype=torch.long),
        labels=torch.randint(11, (rows,), generator=generator),
        sequence=torch.zeros(rows, dtype=torch.long),
    )


def nll(side: Side) -> float:
    logits = side.hidden.double() @ side.head.weight.double().T
    return float(torch.nn.functional.cross_entropy(logits, side.labels, reduction="sum"))


def test_both_models_are_measured_per_byte_of_the_same_text() -> None:
    student, teacher, sizes = side(7, 4, 0), side(7, 6, 1), torch.tensor([20, 13])
    found = fidelity(student, teacher, None, sizes, of_teacher=True)
    assert float(found["nll_per_byte"].value) == pytest.approx(nll(student) / 33, rel=1e-5)
    assert float(found["teacher_nll_per_byte"].value) == pytest.approx(nll(teacher) / 33, rel=1e-5)
    assert "teacher_nll_per_byte" not in fidelity(student, teacher, None, sizes)


def test_records_that_another_teacher_answers_count_nothing_for_this_one() -> None:
    student, teacher, sizes = side(7, 4, 0), side(7, 6, 1), torch.tensor([20, 13])
    answered = fidelity(student, teacher, None, sizes, of_teacher=True)
    silent = fidelity(student, teacher.nothing(), None, sizes, answers=False, of_teacher=True)
    both = {name: answered[name].total + silent[name].total for name in answered}
    counts = {name: answered[name].count + silent[name].count for name in answered}
    mean = both["teacher_nll_per_byte"] / counts["teacher_nll_per_byte"]
    assert float(mean) == pytest.approx(nll(teacher) / 33, rel=1e-5)
    assert float(both["nll_per_byte"] / counts["nll_per_byte"]) == pytest.approx(nll(student) / 33, rel=1e-5)
