"""Trainers on a processor that only emulates bfloat16 are told so, where it matters."""

from __future__ import annotations

import lightning as L
import pytest
from transformers import LlamaConfig

from dskd_lightning.launch.configs import config_path
from dskd_lightning.models.spec import StudentSpec, TeacherSpec
from dskd_lightning.module import DistillationModule
from dskd_lightning.objectives import LogitKDObjective
from dskd_lightning.processor import FLOAT32_CONFIG
from dskd_lightning.training import on_processor
from dskd_lightning.training.on_processor import suit_processor


def said(caplog: pytest.LogCaptureFixture, precision: str, teacher: str, times: float) -> str:
    caplog.clear()
    trainer = L.Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_processor, "slowdown", lambda: times)
        suit_processor(trainer, [object(), TeacherSpec(source="t", dtype=teacher)])
    return "".join(record.message for record in caplog.records if record.name == on_processor.__name__)


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


def test_a_module_tells_before_its_models_are_built(monkeypatch, caplog) -> None:
    monkeypatch.setattr(on_processor, "slowdown", lambda: 21.4)
    teacher = TeacherSpec(source="nowhere", dtype="bfloat16")
    module = DistillationModule(StudentSpec(source="nowhere"), LogitKDObjective(), teacher)
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.setup("fit")
    assert "takes 21 times as long in bfloat16" in caplog.text


@pytest.mark.parametrize(("dtype", "told"), [("bfloat16", True), ("float32", False)])
def test_auto_is_the_type_of_the_checkpoint(dtype, told, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(on_processor, "slowdown", lambda: 21.4)
    LlamaConfig(dtype=dtype).save_pretrained(tmp_path)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    suit_processor(trainer, [TeacherSpec(source=str(tmp_path))])
    assert ("takes 21 times as long" in caplog.text) == told


@pytest.mark.parametrize("devices", [1, 2])
def test_a_trainer_on_the_processor_is_limited(devices, monkeypatch) -> None:
    limited: list[int] = []
    monkeypatch.setattr(on_processor, "limit_threads", limited.append)
    suit_processor(
        L.Trainer(accelerator="cpu", devices=devices, logger=False, enable_checkpointing=False), []
    )
    assert limited == [devices]
