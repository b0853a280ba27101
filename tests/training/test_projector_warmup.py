"""Projectors warm up alone: the student stays, and what they learn is what they learn beside it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from gpu_checks.setup import Setup, finite
from gpu_checks.training import SaveFirstStep
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.models.output import decoder_of

DUAL = ("DSKD", "DSKD v2", "ETA", "ETA distribution", "CMA")
ALONE = ("DSKD v2", "ETA", "ETA distribution")
OPTIONS: dict[str, Any] = {"limit_val_batches": 0}


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


class _Watch(L.Callback):
    """Weights after each optimiser step, rates in it, and how often the student's decoder ran."""

    def __init__(self) -> None:
        self.students: list[dict[str, Tensor]] = []
        self.projectors: list[dict[str, Tensor]] = []
        self.rates: list[dict[str, float]] = []
        self.runs = [0]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._keep(pl_module)
        decoder_of(pl_module.student).register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.runs[-1] += 1

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        self.rates.append({str(group["name"]): float(group["lr"]) for group in groups})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self._keep(pl_module)
        self.runs.append(0)

    def _keep(self, module: Any) -> None:
        for kept, part in ((self.students, module.student), (self.projectors, module.objectives)):
            kept.append({name: p.detach().clone() for name, p in part.named_parameters()})


def fit(
    setup: Setup, objective: str, warmup: int, *callbacks: L.Callback, steps: int = 4, **run: Any
) -> _Watch:
    watch = _Watch()
    module, data = setup.run(objective, **{"optimizer": adam, **run})
    module.projector_warmup_steps = warmup
    trainer = setup.trainer(
        max_steps=steps, callbacks=[watch, *callbacks], gradient_clip_val=1.0, limit_val_batches=0
    )
    trainer.fit(module, datamodule=data)
    finite(trainer.callback_metrics)
    return watch


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("objective", DUAL)
def test_the_student_stays_and_projectors_learn_as_beside_it(objective: str, cached: bool) -> None:
    setup = Setup("cpu")
    fit(setup, objective, 0, steps=1)  # what is made or measured once draws numbers, too
    how: dict[str, Any] = {"cached": cached, "optimizer": lambda p: torch.optim.SGD(p, lr=0.05)}
    watch, usual = fit(setup, objective, 2, **how), fit(setup, objective, 0, **how)
    begin, first, second, third, _ = watch.students
    assert same(begin, first)
    assert same(begin, second)
    assert not same(begin, third)
    assert not same(watch.projectors[0], watch.projectors[1])
    assert same(watch.projectors[0], usual.projectors[0])
    for name, weight in watch.projectors[1].items():
        torch.testing.assert_close(weight, usual.projectors[1][name])
    assert watch.runs[:2] == [0 if objective in ALONE else 1] * 2
    assert watch.runs[2:4] == [1, 1]
    own = [rates["student"] for rates in watch.rates]
    assert own[:2] == [0.0, 0.0]
    assert own[2:] == [rates["student"] for rates in fit(setup, objective, 0, steps=2, **how).rates]
    assert [r["projector"] for r in watch.rates] == [r["projector"] for r in usual.rates]


def test_adapters_stay_too() -> None:
    watch = fit(Setup("cpu"), "ETA", 2, lora=True)
    assert same(watch.students[0], watch.students[2])
    assert not same(watch.students[0], watch.students[4])


def test_a_run_that_is_resumed_within_goes_on_with_it() -> None:
    setup = Setup("cpu")
    path = str(setup.folder / "warm.ckpt")
    whole = fit(setup, "ETA", 2, SaveFirstStep(path))
    module, data = setup.run("ETA", optimizer=adam)
    module.projector_warmup_steps = 2
    watch = _Watch()
    trainer = setup.trainer(max_steps=4, callbacks=[watch], **OPTIONS)
    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=False)
    assert same(watch.students[-1], whole.students[-1])
    assert same(watch.projectors[-1], whole.projectors[-1])


@pytest.mark.parametrize("objective", ["ETA", "ETA distribution"])
def test_metrics_of_a_warm_up_are_those_of_the_step(objective: str) -> None:
    setup, found = Setup("cpu"), []
    for warmup in (2, 0):
        module, data = setup.run(objective)
        module.projector_warmup_steps = warmup
        trainer = setup.trainer(max_steps=3 if warmup else 1, limit_train_batches=1, max_epochs=3)
        values: list[dict[str, float]] = []

        class _Log(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                values.append(finite(trainer.callback_metrics))  # noqa: B023

        trainer.callbacks.append(_Log())  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=data)
        found.append(values)
    for name in ("t2s_ce", "t2s_agreement"):
        assert found[0][0][f"train/{name}"] == pytest.approx(found[1][0][f"train/{name}"], rel=1e-5)
    assert "train/ce" not in found[0][1]
    assert "train/ce" in found[0][2]


@pytest.mark.parametrize(
    ("objective", "warmup", "sentence"),
    [("logits", 2, "no projector or other part"), ("ETA", 4, "4 of 4 steps leave none")],
)
def test_what_would_warm_up_nothing_or_train_nothing_is_refused(
    objective: str, warmup: int, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        fit(Setup("cpu"), objective, warmup)


def test_it_needs_a_trainer_and_a_number_of_steps() -> None:
    setup = Setup("cpu")
    module, _ = setup.run("ETA")
    with pytest.raises(UserError, match="must be at least 0"):
        type(module)(module.student_spec, module.objectives[0], projector_warmup_steps=-1)
    module.projector_warmup_steps = 1
    module.configure_model()
    module._lr_scheduler = torch.optim.lr_scheduler.ConstantLR
    with pytest.raises(UserError, match="a Trainer counts them"):
        module.configure_optimizers()
