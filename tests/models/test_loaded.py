"""Models in memory beside specs: the same run, the very models, and one sentence where they can't be used."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pretended_gpu import PretendedGpu
from test_distillation_module import fit
from tiny_runs import write_data
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import dskd_lightning as dl


def loaded(folder: str, **options) -> dl.Loaded:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return dl.Loaded(model, AutoTokenizer.from_pretrained(folder), **options)


def run(student, teacher, tmp_path):
    torch.manual_seed(0)
    module = dl.DistillationModule(student, dl.DSKDObjective(), teacher)
    torch.manual_seed(0)  # building from files draws numbers, too
    module.configure_model()
    data = dl.InstructionDataModule(
        str(write_data(tmp_path / "data.jsonl")), val_split=4, student=student, teacher=teacher,
        max_length=96, max_prompt_length=40, batch_size=4, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    fit(module, data, limit_val_batches=None)
    return module


def test_models_in_memory_train_as_their_specs_do(model_folder, tmp_path):
    folders = model_folder(seed=1), model_folder(hidden=24, seed=2)
    student, teacher = map(loaded, folders)
    before = copy.deepcopy(teacher.model.state_dict())
    module = run(student, teacher, tmp_path)
    assert module.student is student.model
    assert all(part.training for part in student.model.modules())
    assert module.teachers[0] is teacher.model
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())
    assert not any("teacher" in name for name in module.state_dict())
    other = run(dl.StudentSpec(folders[0]), dl.TeacherSpec(folders[1]), tmp_path)
    for name, value in other.student.state_dict().items():
        torch.testing.assert_close(student.model.state_dict()[name], value, msg=name)
    module.student.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(v, student.model.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_peft_model_stays_as_it_is(model_folder, tmp_path):
    student = loaded(model_folder(seed=1))
    adapted = get_peft_model(student.model, LoraConfig(r=2, target_modules=["q_proj"]))
    base = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    first = {n: p.clone() for n, p in adapted.named_parameters() if p.requires_grad}
    module = run(dl.Loaded(adapted, student.tokenizer), loaded(model_folder(hidden=24, seed=2)), tmp_path)
    assert module.student is adapted
    assert isinstance(module.student, PeftModel)
    now = dict(adapted.named_parameters())
    assert all(torch.equal(now[n], p) and not now[n].requires_grad for n, p in base.items())
    assert any(not torch.equal(now[n], p) for n, p in first.items())
    trained = {n for n in module.state_dict() if n.startswith("student.")}
    assert trained == {f"student.{n}" for n in first}


def test_what_cannot_be_used_is_said_at_once(model_folder):
    folder = model_folder(seed=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(dl.UserError, match="fast tokenizer"):
        dl.Loaded(model, PreTrainedTokenizerBase())
    with pytest.raises(dl.UserError, match="fast tokenizer"):
        dl.Loaded(model, None)
    with pytest.raises(dl.UserError, match="a model of transformers or peft, not Linear"):
        dl.Loaded(torch.nn.Linear(2, 2), tokenizer)
    with pytest.raises(dl.UserError, match="device_map"):
        dl.Loaded(copy.deepcopy(model).to("meta"), tokenizer)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(dl.UserError, match="end-of-sequence"):
        dl.Loaded(model, endless)
    shared = dl.Loaded(model, tokenizer)
    with pytest.raises(dl.UserError, match="share weights"):
        dl.DistillationModule(shared, dl.DSKDObjective(), dl.Loaded(model, tokenizer)).configure_model()
    frozen = dl.Loaded(copy.deepcopy(model).requires_grad_(False), tokenizer)
    with pytest.raises(dl.UserError, match="no trainable parameter"):
        dl.DistillationModule(frozen, dl.SFTObjective()).configure_model()


def test_a_student_on_another_device_than_its_teacher_is_one_sentence(model_folder) -> None:
    student, teacher = loaded(model_folder(seed=1)), loaded(model_folder(hidden=24, seed=2))
    with PretendedGpu():
        student.model.to("cuda")
        module = dl.DistillationModule(student, dl.DSKDv2Objective(), teacher)
        with pytest.raises(dl.UserError, match=r"is on cuda:0 and the teacher '.*' on cpu: load both on one"):
            module.configure_model()
