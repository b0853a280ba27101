"""Teachers whose weights follow the student's: when, how far, and exactly so after a resume."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny_runs import write_data

import dskd_lightning as dl
from dskd_lightning.models.spec import FollowSpec
from dskd_lightning.teacher_cache import TeacherCacheSettings

HEAD = "lm_head.weight"


class Watch(Callback):
    """The student in front of every step, and the teacher's head as it read the step's batch."""

    def __init__(self) -> None:
        self.student: list[torch.Tensor] = []
        self.teacher: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.student.append(weight(module.student))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.teacher.append(weight(module.teachers[0]))


def weight(model) -> torch.Tensor:
    """The head's weight, or what an adapter makes of a layer's."""
    if hasattr(model, "peft_config"):
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        return layer.base_layer.weight.detach().double() + layer.get_delta_weight("default").detach().double()
    name = HEAD if HEAD in dict(model.named_parameters()) else "model.embed_tokens.weight"
    return dict(model.named_parameters())[name].detach().double().clone()


def make(folder: str, tmp_path: Path, follow: FollowSpec, objective=None, student=None, **options):
    student = student or dl.StudentSpec(folder)
    teacher = dl.TeacherSpec(folder, dtype="float32", follow=follow, system="Be brief.")
    torch.manual_seed(0)
    module = dl.DistillationModule(
        student, objective or dl.LogitKDObjective(), teacher, lambda p: torch.optim.SGD(p, lr=0.3)
    )
    data = dl.InstructionDataModule(
        str(write_data(tmp_path / "data.jsonl", count=14)), student=student, teacher=teacher, batch_size=2,
        max_length=96, max_prompt_length=60, cache_dir=str(tmp_path / "cache"), **options,
    )  # fmt: skip
    return module, data


def fit(module, data, folder: Path, steps: int, checkpoint: str | None = None, **options) -> Watch:
    watch = Watch()
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        max_steps=steps, callbacks=[watch, save], **options,
    ).fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False)  # fmt: skip
    return watch


@pytest.mark.parametrize(("every", "decay"), [(1, 0.0), (2, 0.0), (1, 0.75), (2, 0.5)])
def test_it_follows_as_the_formula_says_and_resumes_exactly(model_folder, tmp_path, every, decay) -> None:
    folder, follow = model_folder(seed=1), FollowSpec(every, decay)
    module, data = make(folder, tmp_path, follow)
    watch = fit(module, data, tmp_path / "whole", 6)
    expected = None
    for step, student in enumerate(watch.student):
        if step % every == 0:
            expected = student if expected is None else decay * expected + (1 - decay) * student
        torch.testing.assert_close(watch.teacher[step], expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(watch.teacher[5], watch.teacher[0])
    for step in (3, 4):
        again, data = make(folder, tmp_path, follow)
        resumed = fit(again, data, tmp_path / "again", 6, str(tmp_path / "whole" / f"step={step}.ckpt"))
        for old, new in zip(watch.teacher[step:], resumed.teacher, strict=True):
            assert torch.equal(old, new)
        for one, other in zip(module.student.parameters(), again.student.parameters(), strict=True):
            assert torch.equal(one, other)
        saved = torch.load(tmp_path / "whole" / f"step={step}.ckpt", weights_only=True)
        assert not any(name.startswith("teachers.") for name in saved["state_dict"])
        needed = decay > 0 or step % every > 0
        assert bool(saved["teachers"][0]["weights"]) == needed


def test_an_adapters_share_is_followed_and_nothing_else(model_folder, tmp_path) -> None:
    folder = model_folder(seed=1)
    student = dl.StudentSpec(folder, lora=dl.LoraSpec(rank=2, targets=["q_proj"]))
    module, data = make(folder, tmp_path, FollowSpec(), student=student)
    fit(module, data, tmp_path / "run", 3)
    module.follow_student(3)
    layer = module.teachers[0].model.layers[0].self_attn.q_proj
    torch.testing.assert_close(layer.weight.double(), weight(module.student), rtol=1e-6, atol=1e-7)
    assert all("q_proj" in name for name in module._followers[0].names)


def test_a_step_of_several_batches_has_one_teacher(model_folder, tmp_path) -> None:
    module, data = make(model_folder(seed=1), tmp_path, FollowSpec(1, 0.5))
    watch = fit(module, data, tmp_path / "run", 3, accumulate_grad_batches=2)
    for first, second in zip(watch.teacher[::2], watch.teacher[1::2], strict=True):
        assert torch.equal(first, second)


def test_what_cannot_follow_is_one_sentence(model_folder, tmp_path) -> None:
    folder = model_folder(seed=1)
    with pytest.raises(dl.UserError, match="every"):
        FollowSpec(0)
    shallow = dl.StudentSpec(model_folder(layers=1, seed=3))
    module, data = make(folder, tmp_path, FollowSpec(), student=shallow)
    with pytest.raises(dl.UserError, match="other weights than the student"):
        module.configure_model()
    module, data = make(folder, tmp_path, FollowSpec(), dl.DSKDv2Objective())
    with pytest.raises(dl.UserError, match="DSKDv2Objective reads the teacher's head once"):
        module.configure_model()
    module, data = make(folder, tmp_path, FollowSpec(1, 0.9))
    module.teacher_specs[0].dtype = "bfloat16"
    with pytest.raises(dl.UserError, match="float32"):
        module.configure_model()
    module, data = make(folder, tmp_path, FollowSpec(), teacher_cache=TeacherCacheSettings())
    with pytest.raises(dl.UserError, match="teacher_cache"):
        fit(module, data, tmp_path / "run", 1)
