"""Whole runs through the Trainer: fit, cache, resume, validate, test and predict, full and with adapters."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import DummyLogger
from pretended_gpu import PretendedGpu

from dskd_lightning.generation.generator import GenerationSettings

from .setup import OBJECTIVES, Setup, finite

EVERYWHERE = ("DSKD", "ETA", "GOLD")
"""Objectives that are tried in every combination on a real GPU, whose minutes are few; others in two."""

OWN_STALLS = {"MinEdit": 2}
"""Most waits for the device that an objective has in a step: the host computes edit distances."""

PER_MODEL = 1
"""transformers looks whether rows are packed; nothing but a cache of keys keeps it from that."""


class _Stalls(L.Callback):
    """Counts the waits of the second training step, logging included, and of a test's batch."""

    def __init__(self) -> None:
        self._before: tuple[Counter[tuple[str, str]], int] = Counter(), 0
        self.of_step: Counter[tuple[str, str]] = Counter()
        self.of_evaluation: Counter[tuple[str, str]] = Counter()
        self.uploads = self._steps = 0

    def _since(self) -> tuple[Counter[tuple[str, str]], int]:
        gpu = PretendedGpu.active
        now = (Counter[tuple[str, str]](), 0) if gpu is None else (Counter(gpu.stalls), gpu.uploads)
        before, self._before = self._before, now
        return now[0] - before[0], now[1] - before[1]

    def on_train_batch_end(self, *_: Any) -> None:
        self._steps += 1
        since = self._since()
        if self._steps == 2:
            self.of_step, self.uploads = since

    def on_test_batch_start(self, *_: Any) -> None:
        self._since()

    def on_test_batch_end(self, *_: Any) -> None:
        self.of_evaluation, _uploads = self._since()

    def check(self, objective: str, models: int) -> None:
        """Compare with the most that may be.

        Args:
            objective: one of `OBJECTIVES`.
            models: that run in a step.
        """
        most = PER_MODEL * models + OWN_STALLS.get(objective, 0) + 1  # all figures come to the host at once
        assert self.of_step.total() <= most, f"waits in a step, more than {most}: {dict(self.of_step)}"
        assert self.uploads == 1, f"a batch moves in {self.uploads} pieces"
        assert self.of_evaluation.total() <= PER_MODEL * models, f"evaluation: {dict(self.of_evaluation)}"


class SaveFirstStep(L.Callback):
    """Saves a checkpoint after the first step."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1 and not Path(self.path).exists():
            trainer.save_checkpoint(self.path)


def checks(setup: Setup) -> Iterator[tuple[str, Callable[[], str]]]:
    for name, (kind, _) in OBJECTIVES.items():
        combinations = list(product((False, True), (False, True)))
        if name not in EVERYWHERE and not setup.pretended:
            combinations = [(False, False), (True, True)]
        for cached, lora in combinations:
            if cached and not kind.needs_teacher:
                continue
            label = f"{'cached' if cached else 'teacher runs'}, {'LoRA' if lora else 'full'}"
            yield f"train {name}, {label}", partial(train, setup, name, cached, lora)


def train(setup: Setup, name: str, cached: bool, lora: bool) -> str:
    cache, path = (tempfile.mkdtemp(dir=setup.folder) for _ in range(2))
    path += "/saved.ckpt"
    stalls, kept, found = _Stalls(), [], {}
    for start in (None, path):
        module, data = setup.run(name, cached=cached, cache=cache, lora=lora)
        trainer = setup.trainer(
            callbacks=[stalls, SaveFirstStep(path)], logger=DummyLogger(), log_every_n_steps=1,
            limit_test_batches=1, limit_predict_batches=1,
        )  # fmt: skip
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=False)
        kept.append({key: value.cpu() for key, value in module.state_dict().items()})
        found |= finite(trainer.callback_metrics)
    worst = max(float((kept[0][key] - kept[1][key]).abs().max()) for key in kept[0])
    assert worst < (1e-6 if setup.small else 2e-3), f"a resumed run differs by {worst:.1e}"
    for function in (trainer.validate, trainer.test):
        function(module, datamodule=data, verbose=False)
        found |= finite(trainer.callback_metrics)
    module.generation = GenerationSettings(max_new_tokens=4)
    answers = trainer.predict(module, datamodule=data)
    assert answers, "nothing was predicted"
    if PretendedGpu.active is not None and PretendedGpu.active.float64:
        stalls.check(name, models=1 if cached or not OBJECTIVES[name][0].needs_teacher else 2)
    assert trainer.strategy.root_device.type == setup.device.type
    if cached:
        assert not module.complete_teachers, "the whole teacher was loaded beside its cache"
    if cached and not setup.pretended:
        again, more = setup.run(name, cached=False, lora=lora)
        other = setup.trainer()
        other.fit(again, datamodule=more)
        apart = abs(float(other.callback_metrics["train/loss"]) / found["train/loss"] - 1)
        assert apart < 1e-2, f"the loss from the cache is {apart:.1e} off"
    return f"loss {found['train/loss']:.4f}, val nll {found['val/nll_per_token']:.4f}"
