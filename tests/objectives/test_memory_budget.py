"""On a device the vocabulary-sized tensors of a chunk take what the budget says, and no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pretended_gpu
import pytest
import torch
from cross_tokenizer_cases import make_case
from gpu_checks.losses import moved
from gpu_checks.setup import OBJECTIVES
from pretended_gpu import DeviceTensor, PretendedGpu
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dskd_lightning.functional import AdaptiveKL, Divergence, ForwardKL, JensenShannon, fused_distillation
from dskd_lightning.structures import Head

ROWS = 32


class Living:
    """The most bytes that tensors ``[several, at least vocabulary]`` on the device take together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> None:
        self.vocabulary, self.most = vocabulary, 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._dispatch = pretended_gpu._dispatch
        monkeypatch.setattr(pretended_gpu, "_dispatch", self)  # backward passes run in threads without modes

    def __call__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = self._dispatch(func, args, kwargs)
        for made in out if isinstance(out, tuple | list) else [out]:
            if self._counts(made):
                storage = made.values.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: pair for key, pair in self._alive.items() if not pair[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return out

    def _counts(self, made: Any) -> bool:
        if not isinstance(made, DeviceTensor) or made.layout != torch.strided or made.dim() < 2:
            return False
        return made.shape[0] >= 8 and made.shape[-1] >= self.vocabulary


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_keeps_within_its_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, same = OBJECTIVES[name]
    case = make_case((("bpe", 400), (("bpe", 400) if same else ("sentencepiece", 420))), (16, 24))
    objective = kind()
    copies = getattr(objective, "vocabulary_copies", 16 if kind.needs_teacher else 8)
    budget = copies * (ROWS + 1) * (400 if same else 420) * 4
    objective.memory_budget_mb = budget / 2**20
    objective.configure(moved(case.student_space, "cpu"), moved(case.teacher_space, "cpu"))
    living = Living(monkeypatch, 300)
    with PretendedGpu():
        objective.to("cuda")
        student, teacher = moved(case.student, "cuda"), moved(case.teacher, "cuda")
        assert len(student) > ROWS
        student = replace(student, hidden=student.hidden.requires_grad_())
        pair: tuple[Any, ...] = (student, teacher, None if same else case.alignment.to("cuda"))
        with torch.autocast("cuda", torch.bfloat16):
            objective(*pair[: 3 if kind.needs_teacher else 1]).loss.backward()
    assert budget / 4 < living.most <= budget


@pytest.mark.parametrize("divergence", [ForwardKL(), AdaptiveKL(), JensenShannon()], ids=type)
def test_a_divergence_keeps_within_the_budget(
    divergence: Divergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = 2000
    budget = 16 * (ROWS + 1) * vocabulary * 4

    def side() -> tuple[Tensor, Head]:
        bias = torch.zeros(vocabulary, device="cuda").index_fill_(
            0, torch.tensor(3, device="cuda"), -torch.inf
        )
        return torch.randn(100, 8, device="cuda"), Head(torch.randn(vocabulary, 8, device="cuda"), bias)

    living = Living(monkeypatch, vocabulary)
    with PretendedGpu(), torch.autocast("cuda", torch.bfloat16):
        (hidden, head), (theirs, their_head) = side(), side()
        fused_distillation(
            hidden.requires_grad_(), head, labels=torch.zeros(100, dtype=torch.long, device="cuda"),
            teacher_hidden=theirs, teacher_head=their_head, divergence=divergence,
            memory_budget_mb=budget / 2**20,
        )  # fmt: skip
    assert budget / 2 < living.most <= budget
