"""The gradient to a head's weight: the same however it is added up, and never there twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dskd_lightning.functional import _chunked_head, fused_distillation
from dskd_lightning.structures import Head

VOCAB, HIDDEN, TOKENS = 300, 8, 40


class _Shapes(TorchDispatchMode):
    """Shapes of what products give."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.made.add(tuple(result.shape))
        return result


def _gradient(chunk: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, set[tuple[int, ...]]]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN)
    weight = torch.randn(VOCAB, HIDDEN).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS,))
    with torch.autocast("cpu", torch.bfloat16), _Shapes() as shapes:
        fused_distillation(hidden, Head(weight), labels=labels, chunk_size=chunk).loss.backward()
    assert weight.grad is not None
    return weight.grad, shapes.made


@pytest.mark.parametrize("chunk", [TOKENS, 16])
def test_parts_of_the_vocabulary_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    whole, _ = _gradient(chunk)
    monkeypatch.setattr(_chunked_head, "_WORDS", 64)
    parts, made = _gradient(chunk)
    assert torch.equal(parts, whole)
    assert (64, HIDDEN) in made
    assert (VOCAB, HIDDEN) not in made


def test_a_weight_in_half_precision_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = _gradient(16, torch.bfloat16)
    monkeypatch.setattr(_chunked_head, "_WORDS", 64)
    parts, made = _gradient(16, torch.bfloat16)
    assert torch.equal(parts, whole)
    assert (VOCAB, HIDDEN) in made
