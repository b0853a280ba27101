"""Threads within what the process may use; what a processor only emulates is measured and left."""

from __future__ import annotations

import pytest
import torch

from dskd_lightning import processor
from dskd_lightning.processor import in_a_computed_type, limit_threads, slowdown, working_device


def test_slowdown_is_the_ratio_of_the_times_and_measured_once(monkeypatch) -> None:
    clock, calls = [0.0], []

    def pretended(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(hidden.dtype)
        clock[0] += 8.0 if hidden.dtype == torch.bfloat16 else 2.0
        return hidden

    monkeypatch.setattr(processor, "linear", pretended)
    monkeypatch.setattr(processor.time, "perf_counter", lambda: clock[0])
    slowdown.cache_clear()
    try:
        assert slowdown() == 4.0
        assert slowdown() == 4.0
        assert len(calls) == 12
    finally:
        slowdown.cache_clear()


def test_other_work_that_stops_some_turns_decides_nothing(monkeypatch) -> None:
    clock, calls = [0.0], []

    def pretended(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(hidden.dtype)
        slow = hidden.dtype == torch.bfloat16 and len(calls) < 20
        clock[0] += 0.012 if slow else 0.0003 if hidden.dtype == torch.bfloat16 else 0.001
        return hidden

    monkeypatch.setattr(processor, "linear", pretended)
    monkeypatch.setattr(processor.time, "perf_counter", lambda: clock[0])
    slowdown.cache_clear()
    try:
        assert slowdown() == pytest.approx(0.3)
    finally:
        slowdown.cache_clear()


@pytest.fixture
def threads(monkeypatch) -> list[int]:
    """What PyTorch was told; it starts with 8, on 8 cores with the time of 4."""
    told: list[int] = []
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processor, "cpu_quota", lambda: 4.0)
    monkeypatch.setattr(processor.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(processor, "affine_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


@pytest.mark.parametrize(("processes", "expected"), [(1, 4), (2, 2), (4, 1), (9, 1)])
def test_each_process_computes_with_its_part_of_the_usable_cores(processes, expected, threads) -> None:
    limit_threads(processes)
    assert threads == [expected]


def test_never_more_than_pytorch_would_take(threads, monkeypatch) -> None:
    monkeypatch.setattr(
        torch, "get_num_threads", lambda: 3
    )  # four logical cores, say, of three physical ones
    limit_threads()
    assert threads == [3]


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
@pytest.mark.parametrize("number", ["6", "8"])
def test_a_users_number_of_threads_stays(name, number, threads, monkeypatch) -> None:
    monkeypatch.setenv(name, number)
    limit_threads()
    assert threads == []


@pytest.mark.parametrize(("affine", "expected"), [(8, 2), (4, 4)])
def test_ranks_share_the_machine_unless_each_has_cores_of_its_own(
    affine, expected, threads, monkeypatch
) -> None:
    monkeypatch.setattr(processor, "cpu_quota", lambda: None)
    monkeypatch.setattr(processor, "affine_cores", lambda: affine)
    monkeypatch.setattr(torch, "get_num_threads", lambda: affine)
    limit_threads(4)
    assert threads == [expected]


def test_what_lightning_gave_its_ranks_is_nobodys_choice(threads, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # 8 cores for two ranks
    limit_threads(2)
    assert threads == [2]


@pytest.mark.parametrize(("available", "expected"), [("cuda", "cuda:3"), ("mps", "mps")])
def test_commands_take_the_accelerator(available, expected, threads, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available == "cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available == "mps")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert working_device() == torch.device(expected)
    assert threads == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emulated_weights_are_turned_to_float32_for_the_processor_alone(dtype, monkeypatch, caplog) -> None:
    caplog.set_level("INFO", processor.__name__)
    monkeypatch.setattr(processor, "slowdown", lambda asked: {dtype: 21.4}[asked])
    model = torch.nn.Linear(3, 2).to(dtype)
    weights = model.weight.detach().clone()
    assert in_a_computed_type(model, torch.device("cuda")).weight.dtype == dtype
    assert in_a_computed_type(model, torch.device("cpu")) is model
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, weights.float())
    assert "takes 21 times as long as float32 on this processor" in caplog.text
    assert in_a_computed_type(model, torch.device("cpu")) is model  # measures nothing in float32
    monkeypatch.setattr(processor, "slowdown", lambda asked: 0.3)
    assert in_a_computed_type(model.to(dtype), torch.device("cpu")).weight.dtype == dtype


def test_commands_on_the_processor_are_limited(threads, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert working_device() == torch.device("cpu")
    assert threads == [2]
