"""Whole runs through the Trainer: fit, validate, test and predict, with the teacher and from a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import lightning as L
from pretended_gpu import PretendedGpu

from dskd_lightning.generation.generator import GenerationSettings

from .setup import OBJECTIVES, Setup, finite

EVERYWHERE = ("DSKD", "ETA", "GOLD")
"""Objectives that are tried in every combination; the others in two opposite ones."""


STALLS = {"CMA": 15, "GOLD": 10, "X-Token H": 10, "MinEdit": 11, "ALM": 9}
"""Most waits for the device in a step, its batch's transfer included; 8 for the others.

Four are transformers' own, who look whether a mask is needed; one tells that the loss is finite.
"""


class _Stalls(L.Callback):
    """Counts the waits from one training step to the next on the pretended GPU."""

    of_last_step = 0
    _before = 0

    def on_train_batch_end(self, *_: Any) -> None:
        gpu = PretendedGpu.active
        total = 0 if gpu is None else gpu.stalls.total()
        self.of_last_step, self._before = total - self._before, total


def checks(setup: Setup) -> Iterator[tuple[str, Callable[[], str]]]:
    for name, (kind, _) in OBJECTIVES.items():
        combinations = list(product((False, True), (False, True)))
        if name not in EVERYWHERE or setup.small:
            combinations = [(False, False), (True, True)]
        for cached, lora in combinations:
            if cached and not kind.needs_teacher:
                continue
            label = f"{'cached' if cached else 'teacher runs'}, {'LoRA' if lora else 'full'}"
            yield f"train {name}, {label}", partial(train, setup, name, cached, lora)


def train(setup: Setup, name: str, cached: bool, lora: bool) -> str:
    module, data = setup.run(name, cached=cached, lora=lora)
    stalls = _Stalls()
    trainer = setup.trainer(callbacks=[stalls])
    trainer.fit(module, datamodule=data)
    values = finite(trainer.callback_metrics)
    for function in (trainer.validate, trainer.test):
        function(module, datamodule=data, verbose=False)
        values |= finite(trainer.callback_metrics)
    module.generation = GenerationSettings(max_new_tokens=4)
    trainer.predict(module, datamodule=data, return_predictions=False)
    if PretendedGpu.active is not None and PretendedGpu.active.float64:
        assert stalls.of_last_step <= STALLS.get(name, 8), f"{stalls.of_last_step} stalls in a step"
    assert trainer.strategy.root_device.type == setup.device.type
    if cached:
        assert not module.complete_teachers, "the whole teacher was loaded beside its cache"
    if cached and not setup.pretended:
        again, more = setup.run(name, cached=False, lora=lora)
        other = setup.trainer()
        other.fit(again, datamodule=more)
        apart = abs(float(other.callback_metrics["train/loss"]) / values["train/loss"] - 1)
        assert apart < 1e-2, f"the loss from the cache is {apart:.1e} off"
    return f"loss {values['train/loss']:.4f}, val nll {values['val/nll_per_token']:.4f}"
