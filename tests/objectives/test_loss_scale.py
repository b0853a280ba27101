"""Gradients follow the factor on the loss exactly once, as a scaler for half precision needs."""

from __future__ import annotations

from itertools import pairwise

import lightning as L
import pytest
import torch
from gpu_checks.setup import OBJECTIVES, Setup
from lightning.pytorch.plugins.precision import MixedPrecision

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


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")  # of the skipped one
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_scaler_skips_steps_that_overflow_and_the_run_learns_on(name: str) -> None:
    """In half precision through Lightning's plugin: the loss is a number, only its scaled gradient isn't."""
    setup = Setup("cpu")
    module, data = setup.run(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-14)
    weights: list[torch.Tensor] = []

    class Weights(L.Callback):
        def on_train_batch_start(self, trainer, module, *_) -> None:
            trained = [p.detach().flatten() for p in module.student.parameters() if p.requires_grad]
            weights.append(torch.cat(trained))

    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = setup.trainer(callbacks=[Weights()], plugins=[plugin], max_steps=4)
    trainer.fit(module, datamodule=data)
    changed = [not torch.equal(*pair) for pair in pairwise(weights)]
    assert changed[0] is False  # the first step was skipped
    assert changed[-1] is True
    assert scaler.get_scale() < 2.0**40
    assert all(p.isfinite().all() for p in module.parameters())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
