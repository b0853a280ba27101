"""A checkpoint gives its module back, by path alone, and runs no code of its own."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from test_distillation_module import make
from torch import nn

import dskd_lightning as dl
from dskd_lightning.alignment.cross_model_attention import CrossModelAttention
from dskd_lightning.described import described, restored


class OwnDivergence(dl.Divergence):
    """A user's own, in a package of theirs."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, student_logits, teacher_logits, temperature=1.0):
        return self.scale * (teacher_logits.softmax(-1) - student_logits.softmax(-1)).square().sum(-1)


class Open(dl.DistillationModule):
    """A subclass that hands on whatever it is given."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)


def trained(model_folder, tmp_path, objective, **options):
    module, data = make(model_folder, tmp_path, objective=objective, **options)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=2, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return module, tmp_path / "a.ckpt"


@pytest.mark.parametrize("lora", [None, dl.LoraSpec(rank=2)])
def test_module_comes_back_with_its_weights(model_folder, tmp_path, lora):
    objective = dl.DSKDObjective(OwnDivergence(scale=2.0), kd_ratio=0.3, initialization="heads")
    module, path = trained(model_folder, tmp_path, objective, lora=lora)
    again = dl.DistillationModule.load_from_checkpoint(path)
    assert not again.training
    assert again.projector_lr == module.projector_lr
    found = again.objectives[0]
    assert (type(found), found.kd_ratio, found.initialization) == (dl.DSKDObjective, 0.3, "heads")
    assert (type(found.divergence), found.divergence.scale) == (OwnDivergence, 2.0)
    assert again.student_spec == module.student_spec
    assert again.teacher_specs == module.teacher_specs
    assert module.state_dict().keys() == again.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_what_was_in_memory_must_be_given(model_folder, tmp_path):
    spec = dl.StudentSpec(model_folder(seed=1))
    module, data = make(model_folder, tmp_path)
    module = dl.DistillationModule(
        dl.Loaded(*spec.build()), dl.DSKDObjective(), dl.TeacherSpec(model_folder(hidden=24, seed=2))
    )
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=1, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    with pytest.raises(dl.UserError, match=r"load_from_checkpoint\(path, student=\.\.\.\)"):
        dl.DistillationModule.load_from_checkpoint(path)
    with pytest.raises(dl.UserError, match=r"load_from_checkpoint\(path, student=\.\.\.\)"):
        Open.load_from_checkpoint(path)
    again = dl.DistillationModule.load_from_checkpoint(path, student=dl.Loaded(*spec.build()))
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_arguments_are_described_in_full():
    value = dl.DSKDCrossAttentionObjective(dl.SkewedReverseKL(0.2), CrossModelAttention(), kd_ratio=0.7)
    text = described(value)
    again = restored(text)
    assert described(again) == text
    assert again.divergence.lam == 0.2
    spec = dl.TeacherSpec("a", template_options={"enable_thinking": True})
    assert restored(described(spec)) == spec
    settings = dl.OnPolicySettings(fraction=[0.0, 1.0])
    assert restored(described(settings)) == settings


@pytest.mark.parametrize(
    "path", ["os.system", "subprocess.Popen", "builtins.eval", "torch.nn.Linear", "no.such.Thing"]
)
def test_nothing_but_our_kinds_is_made(path):
    with pytest.raises(dl.UserError):
        restored({"class_path": path, "init_args": {}})
    assert nn.Linear  # it exists: the refusal is not for want of it


def test_a_foreign_checkpoint_is_one_sentence(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(dl.UserError, match="names no module"):
        dl.DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt")
