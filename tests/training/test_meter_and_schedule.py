"""Exact means over batches and ranks, optimiser groups, and the schedule's shape."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from dskd_lightning import DistillationModule, SFTObjective, StudentSpec, UserError
from dskd_lightning.structures import Ratio
from dskd_lightning.training import RatioMeter, cosine_with_warmup, parameter_groups
from dskd_lightning.training import meter as meter_file


def ratio(total: float, count: int) -> Ratio:
    return Ratio(torch.tensor(total), torch.tensor(count))


def test_sums_in_float32_lose_nothing(monkeypatch) -> None:
    """As on a device without float64; 2**24 + 1 is no float32."""
    monkeypatch.setattr(meter_file, "widest", lambda _: torch.float32)
    meter = RatioMeter()
    for _ in range(2):  # the second time after a reduction
        meter.update({"loss": Ratio(torch.tensor(2.0**24), torch.tensor(2**24))})
        for _ in range(1000):
            meter.update({"loss": Ratio(torch.tensor(1.0), torch.tensor(1))})
        found = meter.reduce()["loss"]
        assert (found.total.item(), found.count.item()) == (2**24 + 1000, 2**24 + 1000)


def test_mean_of_unequal_batches_is_the_mean_over_tokens():
    meter = RatioMeter()
    meter.update({"loss": ratio(10.0, 1)})
    meter.update({"loss": ratio(9.0, 9), "kd": ratio(1.0, 2)})
    values = meter.reduce()
    assert values["loss"].value == pytest.approx(1.9)  # not (10 + 1) / 2
    assert values["kd"].value == pytest.approx(0.5)
    assert not meter


def test_reduction_adds_ranks():
    meter = RatioMeter()
    meter.update({"loss": ratio(3.0, 2)})
    other = torch.tensor([[9.0, 4.0]], dtype=torch.float64)
    assert meter.reduce(lambda sums: sums + other)["loss"].value == pytest.approx(2.0)


def test_nothing_counted_is_zero():
    assert ratio(0.0, 0).value == 0


def test_groups_split_rates_and_decay():
    student, objectives = torch.nn.Linear(3, 2), torch.nn.Linear(2, 4)
    student.weight.requires_grad_(False)
    groups = {g["name"]: g for g in parameter_groups(student, objectives, projector_lr=0.5)}
    assert set(groups) == {"student_no_decay", "projector", "projector_no_decay"}
    assert groups["student_no_decay"]["weight_decay"] == 0.0
    assert "lr" not in groups["student_no_decay"]
    assert groups["projector"]["lr"] == 0.5
    assert groups["projector"]["params"] == [objectives.weight]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_lr": -1.0}, r"model.projector_lr: -1.0 must be a number of at least 0"),
        ({"projector_lr": float("nan")}, r"model.projector_lr: nan"),
        ({"warmup_ratio": -0.1}, r"model.warmup_ratio: -0.1 must lie between 0 and 1"),
        ({"min_lr_ratio": 2.0}, r"model.min_lr_ratio: 2.0"),
    ],
)
def test_rates_that_climb_are_refused(options, message) -> None:
    student = StudentSpec(source="demo")
    with pytest.raises(UserError, match=message):
        DistillationModule(student, SFTObjective(), **options)


@pytest.mark.parametrize(
    ("lr", "bound", "message"),
    [
        (-1.0, None, r"^model.optimizer: Invalid learning rate: -1.0.$"),
        (1.0, -1.0, r"trainer.gradient_clip_val: -1.0 must be at least 0"),
    ],
)
def test_an_optimiser_that_climbs_is_refused(lr: float, bound: float | None, message: str) -> None:
    module = DistillationModule(
        StudentSpec(source="demo"), SFTObjective(), optimizer=lambda p: torch.optim.AdamW(p, lr=lr)
    )
    module.student = torch.nn.Linear(2, 2)
    module.trainer = L.Trainer(gradient_clip_val=bound, accelerator="cpu", logger=False, max_steps=1)
    with pytest.raises(UserError, match=message):
        module.configure_optimizers()


def test_schedule_warms_up_and_ends_at_its_floor():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = cosine_with_warmup(optimizer, total_steps=20, warmup_ratio=0.2, min_lr_ratio=0.1)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] > 0
    assert rates[:4] == sorted(rates[:4])
    assert rates[4] == pytest.approx(2.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)
