"""Projectors that go wrong are named, with a remedy that isn't taken already, and early enough."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

from dskd_lightning.alignment import CrossModelAttention
from dskd_lightning.callbacks import TrainingMonitor
from dskd_lightning.objectives import DSKDCrossAttentionObjective, DSKDObjective
from dskd_lightning.training.projected_trend import ProjectedTrend


def cma(**prior: Any) -> DSKDCrossAttentionObjective:
    return DSKDCrossAttentionObjective(attention=CrossModelAttention(**prior))


def look(name: str, values: list[float], step: int, objective: Any, patience: float = 200) -> dict[str, str]:
    """What is found in steps with these values, the last of which is ``step``."""
    trend, found = ProjectedTrend(0.2, 0.1), dict[str, str]()
    objectives = [objective] * 2
    for index, value in enumerate(values):
        if index in (2, 120):  # a resumed run remembers where it began
            state = trend.state
            trend = ProjectedTrend(0.2, 0.1)
            trend.state = state
        metrics = {f"train/{name}": torch.tensor(value), "train/loss": torch.tensor(99.0)}
        found |= trend.look(metrics, step - len(values) + 1 + index, patience, objectives)
    return found


DSKD = DSKDObjective()


@pytest.mark.parametrize(
    ("name", "values", "step", "sentence"),
    [
        (
            "t2s_ce",
            [3.4] * 5 + [8.7] * 205,
            400,
            r"\(train/t2s_ce\) has risen from 3.40 to 8.70 nats and not",
        ),
        ("t2s_ce", [3.4] * 5 + [8.7] * 205, 400, "not come back in 200 steps"),
        ("t2s_ce", [3.4] * 5 + [8.7] * 204, 400, None),
        ("t2s_ce_1", [3.4] * 5 + [9.0] * 205, 400, "train/t2s_ce_1"),
        ("t2s_ce", [1.0, 5.0, 5.0, 5.0, 5.0] + [4.9] * 300, 400, None),  # one batch is no beginning
        ("t2s_ce", [1.0] * 5 + [2.0] * 100 + [1.6] * 300, 500, None),  # it comes down,
        ("t2s_ce", [1.0] * 5 + [2.0] * 100 + [1.6] * 305, 500, "not come back in 400 steps"),  # but stays up
        ("t2s_ce", [1.0] * 5 + [2.0] * 150 + [1.0] * 50 + [2.0] * 150, 500, None),  # two rises
        ("t2s_ce", [1.0] * 5 + [1.5] * 150 + [2.0] * 55, 500, "not come back in 200 steps"),
        ("t2s_agreement", [0.33] * 10, 200, "at 33% of the positions after 200 steps, 33% at first"),
        ("t2s_agreement", [0.0] + [0.08] * 30, 200, "at 8% of the positions after 200 steps, 6% at first"),
        ("t2s_agreement", [0.33] * 10, 199, None),
        ("t2s_agreement", [0.3] * 5 + [0.6] * 20, 200, None),
        ("t2s_agreement", [0.9] * 5 + [0.8] * 5, 200, None),
        ("partner_attention", [0.012] * 12, 200, r"byte-exact partner 1.2% of its weight after 200 steps"),
        ("partner_attention", [0.012] * 12, 100, None),
        ("partner_attention", [0.012] * 5 + [0.9] * 12, 300, None),
        ("partner_attention", [0.012] * 9, 300, None),
    ],
)
def test_projectors_that_go_wrong_are_told(name, values, step, sentence) -> None:
    found = list(look(name, values, step, DSKD).values())
    assert len(found) == (sentence is not None)
    assert sentence is None or re.search(sentence, found[0])


@pytest.mark.parametrize(
    ("name", "values", "objective", "has", "lacks"),
    [
        (
            "t2s_ce",
            [1.0] * 5 + [9.0] * 205,
            DSKDObjective(scale_inputs=False),
            "scale_inputs: true",
            "or another",
        ),
        ("t2s_ce", [1.0] * 5 + [9.0] * 205, DSKDObjective(), "lower model.projector_lr.", "scale_inputs"),
        ("t2s_agreement", [0.1] * 10, DSKDObjective(), "take `initialization: heads`, or", "nothing"),
        (
            "t2s_agreement",
            [0.1] * 10,
            DSKDObjective(initialization="heads"),
            "take another model.projector_lr.",
            "heads",
        ),
        ("partner_attention", [0.01] * 10, cma(), "byte_prior: 1.0", "raise"),
        ("partner_attention", [0.01] * 10, cma(byte_prior=1.0), "raise its byte_prior above 1", "set"),
        (
            "partner_attention",
            [0.01] * 10,
            cma(byte_prior=1.0, byte_prior_steps=5),
            "leave byte_prior_steps out",
            "set",
        ),
        ("partner_attention", [0.01] * 10, None, "byte_prior: 1.0", "raise"),
    ],
)
def test_the_remedy_is_not_what_is_set_already(name, values, objective, has, lacks) -> None:
    (message,) = look(name, values, 300, objective).values()
    assert has in message
    assert lacks not in message


def test_a_short_run_warns_by_its_third(trained_by_monitor) -> None:
    for patience, steps, warned in ((200, 120, True), (200, 123, False), (200, 9, False), (5, 300, True)):
        monitor = TrainingMonitor(patience=patience)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained_by_monitor(monitor, steps)
        assert len(caught) == warned, (patience, steps)


@pytest.fixture
def trained_by_monitor():
    """``train(monitor, steps)``: forty steps of a training that has so many, with the attention elsewhere."""

    class Trainer:
        """What the monitor reads of one."""

        callbacks: tuple[Any, ...] = ()
        train_dataloader = None
        log_every_n_steps = 1000
        accumulation_scheduler = None

        def __init__(self, steps: int) -> None:
            self.estimated_stepping_batches, self.global_step = steps, 0
            self.callback_metrics = {"train/partner_attention": torch.tensor(0.01)}

    def train(monitor: TrainingMonitor, steps: int) -> None:
        trainer: Any = Trainer(steps)
        module, batch = torch.nn.Linear(1, 1), _Batch()
        monitor.on_train_start(trainer, module)
        for trainer.global_step in range(1, min(steps, 40) + 1):
            monitor.on_train_batch_end(trainer, module, None, batch, 0)

    return train


class _Batch:
    class student:
        input_ids = torch.zeros(2, 3)
