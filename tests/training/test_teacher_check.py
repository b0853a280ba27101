"""Before training both models' likelihoods are measured, and a teacher that knows less is named."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
from gpu_checks.setup import Setup
from lightning.pytorch.loggers import CSVLogger

import dskd_lightning as dl
from dskd_lightning.callbacks import TeacherCheck
from dskd_lightning.runs.metrics_file import read_rows
from dskd_lightning.training import teacher_check


def nats_per_byte(spec: dl.StudentSpec | dl.TeacherSpec, data: dl.InstructionDataModule, index: int) -> float:
    """By transformers' own logits, one example after the other."""
    model, total, size = spec.build()[0].eval(), 0.0, 0
    for batch in data.val_dataloader():
        tokens = (batch.student, *batch.teachers)[index]
        for row in range(len(tokens.input_ids)):
            real = int(tokens.attention_mask[row].sum())
            with torch.no_grad():
                logits = model(tokens.input_ids[row : row + 1, :real]).logits[0].double()
            labels = tokens.labels[row, :real]
            chosen = logits.log_softmax(-1)[torch.arange(real), labels.clamp(min=0)]
            total -= float(chosen[labels >= 0].sum())
        size += int(batch.response_bytes.sum())
    return total / size


Fitted = tuple[Any, Any, list[dict[str, str]]]


def fit(setup: Setup, folder: Path, *callbacks: L.Callback, **run: Any) -> Fitted:
    module, data = setup.run("ETA", **run)
    logger = CSVLogger(folder, name="", version="")
    options: dict[str, Any] = {"log_every_n_steps": 1, "max_epochs": 1, "max_steps": -1}
    trainer = setup.trainer(callbacks=list(callbacks), logger=logger, **options)
    trainer.fit(module, datamodule=data)
    return module, trainer, read_rows(folder / "metrics.csv")


@pytest.mark.parametrize("cached", [False, True])
def test_both_likelihoods_are_those_of_the_models_themselves(tmp_path: Path, cached: bool) -> None:
    setup = Setup("cpu")
    module, trainer, rows = fit(setup, tmp_path, cached=cached)
    _, data = setup.run("ETA")
    data.setup("fit")
    specs = (module.student_spec, module.teacher_specs[0])
    wanted = [nats_per_byte(spec, data, index) for index, spec in enumerate(specs)]
    (start,) = [row for row in rows if row.get("start/nll_per_byte")]
    assert float(start["start/nll_per_byte"]) == pytest.approx(wanted[0], rel=1e-4)
    assert float(start["start/teacher_nll_per_byte"]) == pytest.approx(wanted[1], rel=1e-4)
    assert float(trainer.callback_metrics["val/teacher_nll_per_byte"]) == pytest.approx(wanted[1], rel=1e-4)
    (validated,) = [row for row in rows if row.get("val/nll_per_byte")]
    assert float(validated["val/teacher_nll_per_byte"]) == pytest.approx(wanted[1], rel=1e-4)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_an_evaluation_without_training_tells_both(stage: Literal["val", "test"]) -> None:
    setup = Setup("cpu")
    module, data = setup.run("ETA")
    data.setup("fit")
    specs = (module.student_spec, module.teacher_specs[0])
    wanted = [nats_per_byte(spec, data, index) for index, spec in enumerate(specs)]
    trainer = setup.trainer()
    evaluate = trainer.validate if stage == "val" else trainer.test
    (found,) = evaluate(module, dataloaders=data.val_dataloader(), verbose=False)
    assert found[f"{stage}/nll_per_byte"] == pytest.approx(wanted[0], rel=1e-4)
    assert found[f"{stage}/teacher_nll_per_byte"] == pytest.approx(wanted[1], rel=1e-4)


def test_it_changes_nothing_of_the_training(tmp_path: Path, monkeypatch: Any) -> None:
    setup, found, modes = Setup("cpu"), [], []
    read = teacher_check._likelihoods

    def watched(module: Any, batch: Any) -> Any:
        modes.append(any(part.training for part in module.modules()))
        return read(module, batch)

    monkeypatch.setattr(teacher_check, "_likelihoods", watched)
    for name in ("draws", "on", "off"):  # what is made once draws numbers, too
        check = TeacherCheck(enabled=name != "off")
        module, *_ = fit(setup, tmp_path / name, check, student={"lora": dl.LoraSpec(rank=2, dropout=0.5)})
        found.append({key: value.clone() for key, value in module.state_dict().items()})
        assert any(part.training for part in module.student.modules())
    assert modes == [False, False]  # dropout is off while it measures, one batch each
    assert all(torch.equal(found[1][key], found[2][key]) for key in found[1])


@pytest.mark.parametrize(
    ("student", "teacher", "says"),
    [([0.6], 0.5, 0), ([0.4], 0.5, 1), ([0.6, 0.55, 0.45, 0.4], 0.5, 1), ([0.5], 0.5, 0)],
)
def test_a_teacher_that_knows_less_is_named_once(student: list[float], teacher: float, says: int) -> None:
    check = TeacherCheck()
    check._teacher = teacher
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for value in student:
            check._compare(value)
    found = [str(w.message) for w in caught]
    assert len(found) == says
    assert all("better (0.4" in text and "teacher (0.500)" in text for text in found)


def test_a_resumed_run_measures_nothing_again(tmp_path: Path, monkeypatch: Any) -> None:
    setup = Setup("cpu")
    module, trainer, _ = fit(setup, tmp_path / "first")
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    wanted = float(trainer.callback_metrics["val/teacher_nll_per_byte"])
    monkeypatch.setattr(TeacherCheck, "_measured", lambda *_: pytest.fail("measured again"))
    module, data = setup.run("ETA")
    again = setup.trainer(max_epochs=2, max_steps=-1)
    again.fit(module, datamodule=data, ckpt_path=tmp_path / "end.ckpt", weights_only=False)
    assert float(again.callback_metrics["val/teacher_nll_per_byte"]) == wanted


def test_nothing_is_measured_without_a_teacher_or_a_validation_set() -> None:
    setup = Setup("cpu")
    cases: list[tuple[str, dict[str, Any], bool]] = [
        ("SFT", {}, True), ("ETA", {"limit_val_batches": 0}, True), ("ETA", {}, False),
    ]  # fmt: skip
    for objective, options, given in cases:
        module, data = setup.run(objective)
        data.setup("fit")
        check = TeacherCheck()
        trainer = setup.trainer(callbacks=[check], **options)
        trainer.fit(
            module, **({"datamodule": data} if given else {"train_dataloaders": data.train_dataloader()})
        )
        assert check._teacher is None
        assert "val/teacher_nll_per_byte" not in trainer.callback_metrics
