"""bfloat16 where a processor only emulates it: measured, said with the remedy, and only where it matters."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from dskd_lightning.launch.configs import config_path
from dskd_lightning.models.spec import StudentSpec, TeacherSpec
from dskd_lightning.module import DistillationModule
from dskd_lightning.objectives import LogitKDObjective
from dskd_lightning.training import processor
from dskd_lightning.training.processor import FLOAT32_CONFIG, bfloat16_slowdown, warn_of_slow_bfloat16


def said(caplog: pytest.LogCaptureFixture, precision: str, teacher: str, slowdown: float) -> str:
    caplog.clear()
    trainer = L.Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "bfloat16_slowdown", lambda: slowdown)
        warn_of_slow_bfloat16(trainer, [object(), TeacherSpec(source="t", dtype=teacher)])
    return "".join(record.message for record in caplog.records if record.name == processor.__name__)


@pytest.mark.parametrize(
    ("precision", "teacher"), [("bf16-mixed", "float32"), ("bf16-true", "auto"), ("32-true", "bfloat16")]
)
def test_slow_bfloat16_is_told_with_its_remedy(precision, teacher, caplog) -> None:
    text = said(caplog, precision, teacher, 21.4)
    assert "takes 21 times as long in bfloat16" in text
    assert f"--config {FLOAT32_CONFIG}" in text
    assert config_path(FLOAT32_CONFIG).is_file()
    assert said(caplog, precision, teacher, 0.3) == ""


def test_nothing_is_measured_in_float32(caplog) -> None:
    assert said(caplog, "32-true", "float32", 21.4) == ""


def test_slowdown_is_the_ratio_of_the_times_and_measured_once(monkeypatch) -> None:
    clock, calls = [0.0], []

    def pretended(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(hidden.dtype)
        clock[0] += 8.0 if hidden.dtype == torch.bfloat16 else 2.0
        return hidden

    monkeypatch.setattr(processor, "linear", pretended)
    monkeypatch.setattr(processor.time, "perf_counter", lambda: clock[0])
    bfloat16_slowdown.cache_clear()
    try:
        assert bfloat16_slowdown() == 4.0
        assert bfloat16_slowdown() == 4.0
        assert len(calls) == 12
    finally:
        bfloat16_slowdown.cache_clear()


def test_a_module_tells_before_its_models_are_built(monkeypatch, caplog) -> None:
    monkeypatch.setattr(processor, "bfloat16_slowdown", lambda: 21.4)
    teacher = TeacherSpec(source="nowhere", dtype="bfloat16")
    module = DistillationModule(StudentSpec(source="nowhere"), LogitKDObjective(), teacher)
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.setup("fit")
    assert "takes 21 times as long in bfloat16" in caplog.text
