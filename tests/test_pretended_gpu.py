"""The pretended GPU refuses what a GPU refuses, and counts what a GPU waits for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from pretended_gpu import PretendedGpu
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data._utils.pin_memory import pin_memory as as_loaders_pin

from dskd_lightning.structures import DistillationBatch, TokenBatch


def kinds(gpu: PretendedGpu) -> Counter[str]:
    return Counter(kind for (kind, _), number in gpu.stalls.items() for _ in range(number))


def test_two_devices_never_meet() -> None:
    with PretendedGpu():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        mixed: list[Callable[[], object]] = [
            lambda: there + here,
            lambda: here[torch.zeros(1, dtype=torch.long, device="cuda")],
            lambda: nn.Linear(3, 2).to("cuda")(here),
            lambda: torch.cat([there, here]),
        ]
        for operation in mixed:
            with pytest.raises(RuntimeError, match="two devices"):
                operation()
        for read in (there.numpy, there.__array__):
            with pytest.raises(TypeError, match="numpy"):
                read()
        assert (there + torch.tensor(1.0)).device == torch.device("cuda", 0)  # numbers may
        assert there[torch.zeros(1, dtype=torch.long)].tolist() == [1.0]  # indices may


def test_training_gives_what_the_cpu_gives() -> None:
    def trained(device: str) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(6.0, device=device).view(2, 3)).square().sum().backward()
            optimizer.step()
        return model[0].weight.detach().cpu()

    with PretendedGpu():
        found = trained("cuda")
    assert torch.equal(found, trained("cpu"))


def test_tied_and_referenced_parameters_stay_what_they_are() -> None:
    with PretendedGpu():
        model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        model[1].weight = weight = model[0].weight
        model.to("cuda")
        assert model[0].weight is model[1].weight is weight
        assert weight.is_cuda


def test_autocast_casts_products() -> None:
    with PretendedGpu(), torch.autocast("cuda", torch.bfloat16):
        layer = nn.Linear(2, 2, device="cuda")
        assert layer(torch.ones(1, 2, device="cuda")).dtype == torch.bfloat16


def test_waits_are_counted() -> None:
    with PretendedGpu() as gpu:
        values = torch.arange(4).pin_memory().to("cuda", non_blocking=True)
        assert gpu.uploads == 1
        assert not gpu.stalls
        values.sum().item()
        values.cpu()
        values[values > 1]
        torch.tensor([1], device="cuda")
        values.nonzero()
    counted = kinds(gpu)
    assert counted == {
        "item": 1, "copy to the host": 1, "boolean mask": 1, "copy to the device": 1, "nonzero": 1,
    }  # fmt: skip
    assert {place.rpartition(":")[0] for _, place in gpu.stalls} == {"tests/test_pretended_gpu.py"}


def test_a_pinned_batch_moves_in_one_piece() -> None:
    ids = torch.arange(12).view(3, 4)
    tokens = TokenBatch(
        ids, ids + 1, ids > 5, torch.arange(4).expand(3, 4), ids.flatten()[:0], ids.flatten().int()
    )
    batch = DistillationBatch(
        tokens, ids[0], ids[1], (replace(tokens, attention_mask=None),),
        teacher_hidden=(torch.randn(5, 3, dtype=torch.bfloat16),), step_tokens=torch.tensor(7),
    )  # fmt: skip
    with PretendedGpu() as gpu:
        pinned = as_loaders_pin(batch)
        there = pinned.to(torch.device("cuda", 0))
        assert gpu.uploads == 1
        replace(pinned, examples=ids[2].pin_memory()).to(torch.device("cuda", 0))
        assert gpu.uploads == 3
        assert not gpu.stalls
        for back in (pinned, there.to("cpu")):
            expected = tree_leaves(list(map(asdict, (batch, batch.student))))
            found = tree_leaves(list(map(asdict, (back, back.student))))
            for ours, theirs in zip(found, expected, strict=True):
                assert type(ours) is type(theirs)
                if isinstance(ours, Tensor):
                    assert ours.dtype == theirs.dtype
                    assert torch.equal(ours, theirs)


def test_a_device_may_lack_float64_and_sparse_tensors() -> None:
    with PretendedGpu(float64=False):
        values = torch.ones(2, 2, device="cuda")
        with pytest.raises(TypeError, match="float64"):
            values.double()
        with pytest.raises(NotImplementedError, match="sparse"):
            values.to_sparse()


def test_nothing_stays_behind() -> None:
    with PretendedGpu():
        pass
    assert not torch.cuda.is_available()
    assert PretendedGpu.active is None
