"""Heads are the largest tensors of a step: a pass casts each once, and evaluation copies none."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from gpu_checks.setup import Setup
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dskd_lightning as dl


class Copies(TorchDispatchMode):
    """Counts what is made of heads as large as the larger part of their rows, by head and by type."""

    def __init__(self, *heads: Tensor) -> None:
        super().__init__()
        self.heads = {head.untyped_storage().data_ptr(): head.shape for head in heads}
        self.found: Counter[tuple[torch.Size, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for place in given & self.heads.keys():
            rows, width = self.heads[place]
            for made in tree_leaves(out):
                own = made.untyped_storage().data_ptr() not in given
                if own and made.dim() == 2 and made.shape[1] == width and 2 * made.shape[0] > rows:
                    self.found[self.heads[place], made.dtype] += 1
        return out


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup("cpu")


def built(setup: Setup, name: str) -> tuple[dl.DistillationModule, dl.DistillationBatch, Copies]:
    module, data = setup.run(name)
    module.configure_model()
    data.prepare_data()
    data.setup("fit")
    heads = [m.get_output_embeddings().weight for m in (module.student, *module.teachers)]
    return module, next(iter(data.val_dataloader())), Copies(*heads)


@pytest.mark.parametrize("name", ["DSKD v2", "GOLD"])
def test_a_step_casts_each_head_once(setup: Setup, name: str) -> None:
    module, batch, copies = built(setup, name)
    with torch.autocast("cpu", torch.bfloat16), copies:
        loss = module.distil(batch).loss
    assert torch.isfinite(loss)
    assert copies.found == dict.fromkeys(((h, torch.bfloat16) for h in copies.heads.values()), 1)
    loss.backward()
    plain, _, _ = built(setup, name)
    expected = plain.distil(batch).loss
    expected.backward()
    ours, theirs = (m.student.get_output_embeddings().weight.grad for m in (module, plain))
    torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.02 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["DSKD", "ETA"])
def test_evaluation_copies_no_head(setup: Setup, name: str) -> None:
    module, batch, copies = built(setup, name)
    with torch.no_grad(), copies:
        module._evaluation_step(batch)
    assert not copies.found
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), copies:
        module._evaluation_step(batch)
    assert copies.found == dict.fromkeys(((h, torch.bfloat16) for h in copies.heads.values()), 1)
