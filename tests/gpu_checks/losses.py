"""Every objective's loss and gradients on the device against those on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from cross_tokenizer_cases import Case, make_case
from torch import Tensor

from dskd_lightning.structures import Side

from .setup import OBJECTIVES, Setup

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 8e-2}


def checks(setup: Setup) -> Iterator[tuple[str, Callable[[], str]]]:
    for dtype in TOLERANCE:
        for name in OBJECTIVES:
            label = str(dtype).removeprefix("torch.")
            yield f"loss {label} {name}", partial(compare, setup.device, name, dtype)


def compare(device: torch.device, name: str, dtype: torch.dtype) -> str:
    """Both in the same dtype, so that what differs is the device's arithmetic."""
    expected, ours = (evaluate(torch.device(d), name, dtype) for d in ("cpu", device.type))
    errors = [difference(a, b) for a, b in zip(ours, expected, strict=True)]
    assert max(errors) <= TOLERANCE[dtype], f"relative error {max(errors):.1e} of {errors}"
    return f"largest relative error {max(errors):.1e} over loss and {len(errors) - 1} gradients"


def difference(ours: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(ours).all(), "not finite"
    scale = max(float(expected.norm()), 1e-6)
    return float((ours - expected).norm()) / scale


def evaluate(device: torch.device, name: str, dtype: torch.dtype) -> list[Tensor]:
    """Loss and gradients of hidden states, head and projectors, in float32 on the CPU."""
    kind, same = OBJECTIVES[name]
    kinds = ("bpe", 400), (("bpe", 400) if same else ("sentencepiece", 420))
    case: Case = make_case(kinds, (16, 24))
    torch.manual_seed(0)
    objective = kind()
    objective.configure(
        moved(case.student_space, "cpu"), moved(case.teacher_space, "cpu") if kind.needs_teacher else None
    )
    objective.to(device)
    student, teacher = moved(case.student, device), moved(case.teacher, device)
    hidden = student.hidden.detach().requires_grad_()
    weight = student.head.weight.detach().requires_grad_()
    student = replace(student, hidden=hidden, head=replace(student.head, weight=weight))
    pair: tuple[Any, ...] = (student,)
    if kind.needs_teacher:
        pair = (student, teacher, None if same else case.alignment.to(device))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = objective(*pair).loss
    leaves = [hidden, weight, *(p for p in objective.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [g.detach().float().cpu() for g in (loss, *gradients) if g is not None]


def moved(value: Any, device: Any) -> Any:
    """On the device, floating-point tensors in float32."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    found = value._map(move)
    return replace(found, head=found.head.detach()) if isinstance(found, Side) else found
