"""The steps that a training is said to have are those that it takes."""

from __future__ import annotations

import lightning as L
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from test_distillation_module import make

from dskd_lightning.training.length import total_steps


@pytest.mark.parametrize("max_steps", [-1, 7])
@pytest.mark.parametrize("scheduling", [None, {1: 3}, {0: 2, 2: 5}])
def test_accumulation_that_changes_is_counted(model_folder, tmp_path, scheduling, max_steps) -> None:
    module, data = make(model_folder, tmp_path)
    found = []

    class Ask(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            found.append(total_steps(trainer))

    callbacks: list[L.Callback] = [Ask()]
    if scheduling is not None:
        callbacks.append(GradientAccumulationScheduler(scheduling))
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=3, max_steps=max_steps, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert found == [trainer.global_step]
    assert max(group["lr"] for group in trainer.optimizers[0].param_groups) < 1e-3  # the schedule's end
