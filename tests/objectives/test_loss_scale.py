"""Gradients follow the factor on the loss exactly once, as a scaler for half precision needs."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from gpu_checks.setup import OBJECTIVES, Setup

SCALE = 2.0**16


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_scale_with_the_loss(name: str) -> None:
    """Fused losses make their gradients in the forward pass, before the factor is known."""
    setup = Setup("cpu")  # whose folder goes with it
    module, data = setup.run(name)
    module.configure_model()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    found = []
    for scale in (1.0, SCALE):
        module.zero_grad()
        torch.manual_seed(0)
        (scale * module.distil(batch).loss).backward()
        found.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert found[0]
    for plain, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, SCALE * plain, rtol=1e-4, atol=1e-7 * SCALE)


def test_a_scaler_skips_a_step_whose_gradients_overflow_and_the_run_goes_on() -> None:
    """The loss is a number: only the scaler knows what to do about the gradient."""
    setup = Setup("cpu")
    module, data = setup.run("DSKD")
    skipped: list[int] = []

    class Overflow(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.global_step == 1 and not skipped:
                next(p for p in module.parameters() if p.grad is not None).grad.fill_(torch.inf)

        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            if any(p.grad is not None and not p.grad.isfinite().all() for p in module.parameters()):
                skipped.append(trainer.global_step)  # what GradScaler.step does instead of the step
                optimizer.zero_grad()

    trainer = setup.trainer(callbacks=[Overflow()], max_steps=3)
    trainer.fit(module, datamodule=data)
    assert skipped == [1]
    assert trainer.global_step == 3
    assert all(p.isfinite().all() for p in module.parameters())
