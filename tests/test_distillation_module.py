"""What `DistillationModule` promises: a frozen teacher, exact means, and one result however it is run."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning as L
import pytest
import torch
from forked_ranks import dskd_ranks
from tiny_runs import write_config, write_data

import dskd_lightning as dl


def make(model_folder, tmp_path, objective=None, teacher=None, batch_size=4, **options):
    student = dl.StudentSpec(model_folder(seed=1), lora=options.pop("lora", None))
    teachers = teacher or dl.TeacherSpec(model_folder(hidden=24, seed=2))
    module = dl.DistillationModule(
        student, objective or dl.DSKDObjective(), teachers, lambda p: torch.optim.SGD(p, lr=0.1), **options
    )
    data = dl.InstructionDataModule(
        str(write_data(tmp_path / "data.jsonl")), val_split=4, student=student, teacher=teachers,
        max_length=96, max_prompt_length=40, batch_size=batch_size, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    return module, data


def fit(module, data, **options):
    options = {"max_epochs": 1, "limit_val_batches": 0, **options}
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer


def test_teacher_stays_frozen_and_in_eval_mode(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path)
    module.configure_model()
    before = {k: v.clone() for k, v in module.teachers[0].state_dict().items()}
    trainer = fit(module, data)
    module.train()
    assert module.student.training
    assert not any(m.training for m in module.teachers.modules())
    assert all(torch.equal(v, before[k]) for k, v in module.teachers[0].state_dict().items())
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in module.teachers.parameters()}
    assert not any("teacher" in name for name in module.state_dict())
    wrapped = torch.nn.ModuleDict({"inner": module}).state_dict()
    assert wrapped
    assert not any("teacher" in name for name in wrapped)


def test_a_teacher_never_goes_between_ranks(model_folder, tmp_path, monkeypatch):
    module, data = make(model_folder, tmp_path)
    module.configure_model()
    data.setup("fit")
    sent, send = [], torch.distributed._broadcast_coalesced

    def counted(group, tensors, *rest):
        sent.append(sum(t.numel() for t in tensors))
        send(group, tensors, *rest)

    monkeypatch.setattr(torch.distributed, "_broadcast_coalesced", counted)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(module)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        assert sum(sent) == trained
        sent.clear()
        wrapped(next(iter(data.train_dataloader())))
        assert not sent
    finally:
        torch.distributed.destroy_process_group()


def test_full_training_checkpoints_the_whole_student(model_folder, tmp_path):
    module, _ = make(model_folder, tmp_path)
    module.configure_model()
    names = {n.removeprefix("student.") for n in module.state_dict() if n.startswith("student.")}
    assert names == set(module.student.state_dict())


def test_accumulation_does_not_change_the_step(model_folder, tmp_path):
    """Micro-batches of very different token counts, and a last window that is not full."""
    results = []
    make(model_folder, tmp_path)  # makes the models, which draws random numbers
    for batch_size, accumulate in ((6, 1), (2, 3), (1, 6)):
        torch.manual_seed(0)  # the projectors' first weights
        module, data = make(model_folder, tmp_path, batch_size=batch_size)
        fit(module, data, accumulate_grad_batches=accumulate)
        results.append(module.state_dict())
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_gradient_is_that_of_the_mean_over_all_tokens(model_folder, tmp_path):
    module, data = make(model_folder, tmp_path, objective=dl.SFTObjective(), batch_size=5, lr_scheduler=None)
    module.configure_model()
    start = {n: p.detach().clone() for n, p in module.student.named_parameters()}
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    tokens = batch.student
    logits = module.student(tokens.input_ids, attention_mask=tokens.attention_mask).logits.double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.labels.flatten())
    gradients = torch.autograd.grad(expected, list(module.student.parameters()), allow_unused=True)
    fit(module, data, max_steps=1)  # with one step in all, the schedule starts at its peak of 0.1
    for (name, parameter), gradient in zip(module.student.named_parameters(), gradients, strict=True):
        step = (start[name] - parameter.detach()) / 0.1
        torch.testing.assert_close(step, gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_several_teachers_are_weighted(model_folder, tmp_path):
    folders = [model_folder(hidden=24, seed=2), model_folder(hidden=20, seed=3)]
    losses = {}
    for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 3.0)):
        teachers = [dl.TeacherSpec(f, weight=w) for f, w in zip(folders, weights, strict=True)]
        torch.manual_seed(0)
        module, data = make(model_folder, tmp_path, [dl.LogitKDObjective(), dl.LogitKDObjective()], teachers)
        module.configure_model()
        data.setup("fit")
        losses[weights] = float(module.distil(next(iter(data.train_dataloader()))).loss.detach())
    expected = (losses[1.0, 0.0] + 3 * losses[0.0, 1.0]) / 4
    assert losses[1.0, 3.0] == pytest.approx(expected, rel=1e-5)


def test_trains_in_true_bfloat16(model_folder, tmp_path):
    """Lightning converts batches by setting their fields, which frozen dataclasses refuse."""
    module, data = make(model_folder, tmp_path)
    trainer = fit(module, data, precision="bf16-true", max_steps=2)
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_wrong_number_of_objectives(model_folder, tmp_path):
    teachers = [dl.TeacherSpec(model_folder(seed=2)), dl.TeacherSpec(model_folder(seed=3))]
    with pytest.raises(dl.UserError, match="as many objectives"):
        make(model_folder, tmp_path, dl.LogitKDObjective(), teachers)


def test_cross_tokenizer_differs_by_one_entry(model_folder, tmp_path):
    teacher = dl.TeacherSpec(model_folder(tokenizer="sentencepiece", hidden=24))
    module, data = make(model_folder, tmp_path, dl.DSKDCrossAttentionObjective(), teacher)
    trainer = fit(module, data, limit_val_batches=1)
    values = trainer.callback_metrics
    assert torch.isfinite(values["train/loss"])
    assert 0 < values["train/alignment_ratio"] <= 1
    assert {"val/aligned_kl", "val/aligned_agreement"} <= values.keys()


def test_checkpoint_of_another_configuration_is_refused(model_folder, tmp_path):
    module, _ = make(model_folder, tmp_path, lora=dl.LoraSpec(rank=2))
    module.configure_model()
    with pytest.raises(dl.UserError, match="lacks"):
        module.on_load_checkpoint({"state_dict": {}})


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as stream:
        return [float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]]


def test_two_processes_train_as_one(model_folder, tmp_path):
    changes = {"trainer.strategy": "ddp", "data.batch_size": 3, "trainer.max_epochs": 2}
    config = write_config(tmp_path, model_folder(seed=1), model_folder(hidden=24, seed=2), **changes)
    one, two = tmp_path / "one", tmp_path / "two"
    fit_one = ("fit", "--config", str(config), "--output", str(one), "--data.batch_size", "6")
    dskd_ranks(*fit_one, "--trainer.devices", "1", folder=tmp_path / "log of one", ranks=1)
    fit_two = ("fit", "--config", str(config), "--output", str(two))
    dskd_ranks(*fit_two, "--trainer.devices", "2", folder=tmp_path / "logs")
    assert len(losses(one)) == len(losses(two)) > 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_every_public_name_is_there():
    assert dl.__all__ == sorted(dl.__all__)
    for name in dl.__all__:
        assert getattr(dl, name) is not None


@pytest.mark.parametrize("joint", [False, True])
def test_projectors_and_student_are_clipped_apart(model_folder, tmp_path, joint):
    """Under one common norm, projectors with large gradients leave the student hardly any."""
    norms: list[list[float]] = []

    class Clipped(dl.DistillationModule):
        def configure_gradient_clipping(self, *args, **options):
            def norm(part):
                return torch.nn.utils.get_total_norm(
                    [p.grad for p in part.parameters() if p.grad is not None]
                )

            before = [float(norm(part)) for part in (self.student, self.objectives)]
            super().configure_gradient_clipping(*args, **options)
            norms.append([*before, *(float(norm(part)) for part in (self.student, self.objectives))])

    _, data = make(model_folder, tmp_path)
    module = Clipped(
        dl.StudentSpec(model_folder(seed=1)), dl.DSKDObjective(scale_inputs=False),
        dl.TeacherSpec(model_folder(hidden=24, seed=2)), joint_clipping=joint,
    )  # fmt: skip
    fit(module, data, gradient_clip_val=0.01, limit_train_batches=2)
    for student, projectors, clipped_student, clipped_projectors in norms:
        whole = (student**2 + projectors**2) ** 0.5
        factors = (0.01 / whole, 0.01 / whole) if joint else (0.01 / student, 0.01 / projectors)
        assert clipped_student == pytest.approx(student * factors[0], rel=1e-3)
        assert clipped_projectors == pytest.approx(projectors * factors[1], rel=1e-3)


def test_a_pruned_student_is_measured_on_training_data_before_any_training(model_folder, tmp_path):
    _, data = make(model_folder, tmp_path)
    spec = dl.StudentSpec(model_folder(seed=1, layers=3), prune=dl.PruneSpec(layers=2))
    module = dl.DistillationModule(spec, dl.DSKDObjective(), dl.TeacherSpec(model_folder(hidden=24, seed=2)))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.validate(module, datamodule=data, verbose=False)
    assert len(module.student_spec.prune.layers) == 2
    assert spec.prune.layers == 2


def test_statistics_over_padding_are_those_of_masked_models(model_folder, tmp_path):
    """As published; without a mask the padding would see itself."""
    module, data = make(model_folder, tmp_path)
    module.configure_model()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    for network, tokens, found in (
        (module.student, batch.student, module.student_side(batch.student, padded_statistics=True)),
        (
            module.teachers[0],
            batch.teachers[0],
            module.teacher_side(0, batch.teachers[0], padded_statistics=True),
        ),
    ):
        assert not tokens.attention_mask.all()
        hidden = network.model(tokens.input_ids, tokens.attention_mask, tokens.position_ids).last_hidden_state
        torch.testing.assert_close(found.padded.hidden_std, hidden.flatten().std())
