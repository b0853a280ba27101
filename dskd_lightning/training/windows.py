"""The batches of an optimiser step, and their response tokens counted before the first backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from dskd_lightning.structures import DistillationBatch

__all__ = ["count_ahead", "look_ahead", "windows"]


def windows(batches: Iterable[DistillationBatch], size: int) -> Iterator[list[DistillationBatch]]:
    """Lists of up to ``size`` batches that know the response tokens of their whole list.

    For training loops of one's own: call ``module.training_step`` and ``backward`` on each batch of a
    list, then step the optimiser once.
    """
    iterator = iter(batches)
    while window := list(itertools.islice(iterator, size)):
        yield count_ahead(window)


def count_ahead(window: list[Any]) -> list[Any]:
    """The batches of one optimiser step with their `DistillationBatch.step_tokens`."""
    if not all(isinstance(batch, DistillationBatch) for batch in window):
        return window
    tokens = torch.tensor(sum(batch.student.response.numel() for batch in window))
    return [replace(batch, step_tokens=tokens) for batch in window]


def look_ahead(trainer: L.Trainer) -> None:
    """Let the Trainer's loader, whatever it is, read the batches of an accumulated step together."""
    loop = trainer.fit_loop
    combined = loop._combined_loader
    scheduled = any(
        isinstance(callback, GradientAccumulationScheduler) for callback in cast("Any", trainer).callbacks
    )
    accumulates = scheduled or trainer.accumulate_grad_batches > 1
    if combined is None or loop._data_fetcher is None or not accumulates or len(combined.flattened) != 1:
        return
    loader = combined.flattened[0]
    if isinstance(loader, _LookingAhead):
        return
    stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    kind = _StatefulLookingAhead if stateful else _LookingAhead
    combined.flattened = [kind(loader, trainer)]
    iter(loop._data_fetcher)  # begins anew: its iterator was made before this hook


class _LookingAhead:
    """A loader whose batches come in windows; all else is the loader's own."""

    def __init__(self, loader: Any, trainer: L.Trainer) -> None:
        self._loader, self._trainer = loader, trainer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_loader", "_trainer"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._loader)
        loop = self._trainer.fit_loop
        done = loop.epoch_loop.batch_progress.current.ready
        while True:
            accumulate = self._trainer.accumulate_grad_batches
            size = min(accumulate - done % accumulate, max(1, loop.max_batches - done))
            window = count_ahead(list(itertools.islice(iterator, int(size))))
            if not window:
                return
            done += len(window)
            yield from window


class _StatefulLookingAhead(_LookingAhead):
    """Lightning saves the state of loaders that have these methods."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)
