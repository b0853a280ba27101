"""One loss per optimiser step, its tokens counted ahead: with any loader, and in plain loops."""

from __future__ import annotations

import torch
from test_distillation_module import fit, make
from torch.utils.data import DataLoader

import dskd_lightning as dl
from dskd_lightning.training.windows import windows


class WithPenalty(dl.DistillationModule):
    """A foreign project: another term, and the hook that is its own."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1 * self.student.lm_head.weight.square().mean()


def trained(make_module, size, loader=None, **options):
    torch.manual_seed(0)  # the projectors' first weights
    module, data = make_module(size)
    data.setup("fit")
    if loader is None:
        fit(module, data, **options)
    else:
        loader(module, list(data.train_dataloader())[:9])
    return module.state_dict()


def assert_same(one, other):
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_steps_are_the_same_however_they_are_cut(model_folder, tmp_path):
    make(model_folder, tmp_path)  # makes the models, which draws random numbers

    def make_module(size):
        base, data = make(model_folder, tmp_path, batch_size=size)
        module = WithPenalty(
            base.student_spec, dl.DSKDObjective(scale_inputs=False), base.teacher_specs,
            lambda p: torch.optim.SGD(p, lr=0.1), lr_scheduler=constant,
        )  # fmt: skip
        return module, data

    def plain_loader(module, batches):
        from lightning import Trainer

        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, max_epochs=1, accumulate_grad_batches=3,
        )  # fmt: skip
        trainer.fit(module, DataLoader(batches, batch_size=None))

    def plain_loop(module, batches):
        module.configure_model()
        optimizer = module.configure_optimizers()["optimizer"]
        for window in windows(batches, 3):
            for batch in window:
                loss = dl.DistillationModule.training_step(module, batch, 0)
                penalty = 0.1 * module.student.lm_head.weight.square().mean()
                (loss + penalty / len(window)).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = trained(make_module, 6, limit_train_batches=2)
    assert_same(whole, trained(make_module, 2, accumulate_grad_batches=3, limit_train_batches=6))
    whole = trained(make_module, 2, accumulate_grad_batches=3, limit_train_batches=9)
    cut = trained(make_module, 2, plain_loader)
    assert_same(whole, cut)
    assert_same(whole, trained(make_module, 2, plain_loop))
    assert "on_before_optimizer_step" not in vars(dl.DistillationModule)  # it is the user's


def constant(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
