"""Rows in memory give the batches that files give, and train in a plain Lightning loop."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import datasets
import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dskd_lightning as dl
from dskd_lightning.structures import DistillationBatch

README = Path(__file__).resolve().parents[2] / "README.md"
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"count to {n}"},
            {"role": "assistant", "content": "1 2 3 " * n},
        ]
    }
    for n in range(1, 9)
]


def tensors(batch: DistillationBatch) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def walk(value, name):
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                walk(item, f"{name}.{index}")
        elif hasattr(value, "__dataclass_fields__"):
            for field in value.__dataclass_fields__:
                walk(getattr(value, field), f"{name}.{field}")

    walk(batch, "")
    return found


@pytest.fixture
def folders(model_folder):
    return model_folder(seed=1), model_folder(hidden=24, seed=2, tokenizer="sentencepiece")


def loaded(folder: str) -> dl.Loaded:
    return dl.Loaded(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


def test_the_collator_and_the_data_module_make_the_same_batch(folders, tmp_path) -> None:
    student, teacher = dl.StudentSpec(folders[0]), dl.TeacherSpec(folders[1])
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = dl.InstructionDataModule(
        str(file), student=student, teacher=teacher, max_length=40, max_prompt_length=16,
        cache_dir=str(tmp_path),
    )  # fmt: skip
    collator = dl.DistillationCollator(student, teacher, max_length=40, max_prompt_length=16)
    expected = tensors(data.train_dataloader().collator([[i] for i in range(8)]))
    for make in (collator, pickle.loads(pickle.dumps(collator))):
        found = tensors(make(ROWS))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert collator.report["truncated responses"] == data.report["train"]["truncated responses"] > 0


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_what_the_readme_shows_runs_as_it_stands(model_folder, tmp_path, monkeypatch, kind) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "DistillationCollator" in block)
    monkeypatch.chdir(tmp_path)
    names = {"a": model_folder(seed=1), "b": model_folder(hidden=24, seed=2), "rows": kind(ROWS)}
    exec(code, names)
    module, student, teacher = (names[name] for name in ("module", "student", "teacher"))
    assert module.student is student.model
    assert module.teachers[0] is teacher.model
    saved, first = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in ("out", names["a"]))
    assert all(torch.equal(value, saved[name]) for name, value in student.model.state_dict().items())
    assert any(not torch.equal(value, saved[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("row", "message"),
    [({"text": 3}, "batch"), ("no record", "instead of a JSON object"), ({"messages": []}, "batch:0")],
)
def test_rows_without_messages_are_one_sentence(folders, row, message) -> None:
    collator = dl.DistillationCollator(dl.StudentSpec(folders[0]))
    with pytest.raises(dl.UserError, match=message):
        collator([row])


def test_a_collator_of_other_models_is_one_sentence_before_the_first_step(model_folder, folders) -> None:
    student, teacher = (loaded(folder) for folder in folders)
    module = dl.DistillationModule(student, dl.DSKDTokenAlignmentObjective(), teacher)
    module.configure_model()
    other = loaded(model_folder(tokenizer="unigram"))
    for models, message in (
        ((other, teacher), "another tokenizer than the student's"),
        ((student, student), "another tokenizer than the teacher's"),
        ((student,), "for 0 teachers, and the module learns from 1"),
    ):
        batch = dl.DistillationCollator(*models)(ROWS)
        for step in (module.training_step, module.validation_step):
            with pytest.raises(dl.UserError, match=message):
                step(batch, 0)
    alone = dl.DistillationModule(student, dl.SFTObjective())
    alone.configure_model()
    assert alone.training_step(dl.DistillationCollator(student, other)(ROWS), 0).isfinite()
    assert module.training_step(dl.DistillationCollator(student, teacher)(ROWS), 0).isfinite()


def test_data_of_other_models_are_one_sentence_before_anything_is_learnt(
    model_folder, folders, tmp_path
) -> None:
    student, teacher = (loaded(folder) for folder in folders)
    other = loaded(model_folder(tokenizer="unigram"))
    for models, message in (
        ((other, teacher), "another tokenizer than the student's"),
        ((student, student), "another tokenizer than the teacher's"),
        ((student,), "for 0 teachers, and the module learns from 1"),
        ((student, teacher), None),
    ):
        module = dl.DistillationModule(student, dl.DSKDTokenAlignmentObjective(), teacher)
        data = dl.InstructionDataModule(
            ROWS * 4, student=models[0], teacher=list(models[1:]), batch_size=2, cache_dir=str(tmp_path)
        )
        trainer = L.Trainer(
            max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        if message is None:
            trainer.fit(module, data)
        else:
            with pytest.raises(dl.UserError, match=message):
                trainer.fit(module, data)
        assert trainer.global_step == (message is None)
