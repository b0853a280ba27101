from __future__ import annotations

import json
import sys

import pytest
import torch
from compared_runs import SFT
from conftest import make_model
from tiny_runs import dskd_fork, write_config

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.efficiency import measure_efficiency
from dskd_lightning.evaluation.energy import EnergyMeter
from dskd_lightning.memory import PeakMemory


def test_measures_a_model(tmp_path) -> None:
    model = make_model(200)
    model.save_pretrained(tmp_path)
    cost = measure_efficiency(model, folder=tmp_path, prompt_tokens=16, new_tokens=4, repeats=2)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.weight_bytes == 4 * cost.parameters
    assert cost.disk_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert cost.prefill_tokens_per_second == pytest.approx(16 / cost.time_to_first_token)
    assert cost.decode_tokens_per_second > 0
    assert cost.device == "cpu"
    assert cost.peak_bytes is None or cost.peak_bytes >= cost.weight_bytes
    json.dumps(cost.to_dict())
    alone = measure_efficiency(model, prompt_tokens=16, new_tokens=4, repeats=1)
    assert alone.disk_bytes == cost.weight_bytes
    file = measure_efficiency(
        model, folder=tmp_path / "model.safetensors", prompt_tokens=16, new_tokens=4, repeats=1
    )
    assert file.disk_bytes == cost.disk_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak can be restarted on Linux only")
def test_peak_memory_is_what_was_used_meanwhile() -> None:
    before = torch.ones(2**25)  # 128 MiB, given back before the measured part
    del before
    peak = PeakMemory(torch.device("cpu"))
    assert peak.extra is not None
    assert peak.extra < 2**25
    block = torch.ones(2**24)  # 64 MiB
    del block
    assert 0.9 * 2**26 < peak.extra < 1.5 * 2**26


def test_bad_lengths() -> None:
    model = make_model(50)
    with pytest.raises(UserError, match="exceed the model's context of 512"):
        measure_efficiency(model, prompt_tokens=500, new_tokens=13)
    with pytest.raises(UserError, match="at least 1"):
        measure_efficiency(model, repeats=0)


def test_energy_from_rapl_with_a_counter_that_wraps(tmp_path) -> None:
    for name, value in (("intel-rapl:0", 1_000_000), ("intel-rapl:1", 9_000_000), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")
    with EnergyMeter(rapl=tmp_path) as meter:
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("3500000\n")
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("500000\n")
    assert meter.joules == pytest.approx(2.5 + 1.5)
    assert meter.sources == ["RAPL"]


def test_no_energy_where_nothing_is_readable(tmp_path) -> None:
    with EnergyMeter(rapl=tmp_path) as meter:
        torch.ones(1)
    assert meter.joules is None
    assert meter.sources == []


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
@pytest.mark.parametrize(("precision", "size"), [("bf16-mixed", 2), ("32-true", 4)])
def test_a_student_is_measured_in_what_its_training_computes_in(
    model_folder, tmp_path, precision, size, lora
) -> None:
    """Its weights in float32 are what the optimiser needs, not what is shipped."""
    config = write_config(
        tmp_path, model_folder(seed=1), None,
        **{"model.objective": SFT, "trainer.precision": precision, "trainer.max_epochs": 1},
        **({"model.student.lora": lora} if lora else {}),
    )  # fmt: skip
    dskd_fork("fit", "--config", str(config))
    dskd_fork("test", "--config", str(config))
    costs = json.loads((tmp_path / "run" / "efficiency.json").read_text())
    assert costs["weight_bytes"] == size * costs["parameters"]
