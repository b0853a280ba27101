"""The batches of an optimiser step, and their response tokens counted before the first backward."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from dskd_lightning.structures import DistillationBatch

__all__ = ["count_ahead", "look_ahead", "windows"]

Replacement = Callable[[Iterator[list[Any]]], Iterator[list[Any]]]


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


def look_ahead(trainer: L.Trainer, replaced: Replacement | None = None) -> bool:
    """Let the Trainer's loader, whatever it is, read the batches of an accumulated step together.

    Args:
        trainer: in a fit.
        replaced: what is learnt in the place of the windows of batches that it gets, which it may read ahead.

    Returns:
        Whether it does.
    """
    loop = trainer.fit_loop
    combined = loop._combined_loader
    scheduled = any(
        isinstance(callback, GradientAccumulationScheduler) for callback in cast("Any", trainer).callbacks
    )
    needed = scheduled or trainer.accumulate_grad_batches > 1 or replaced is not None
    if combined is None or loop._data_fetcher is None or not needed or len(combined.flattened) != 1:
        return False
    loader = combined.flattened[0]
    if isinstance(loader, _LookingAhead):
        return True
    stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    kind = _StatefulLookingAhead if stateful else _LookingAhead
    combined.flattened = [kind(loader, trainer, replaced)]
    iter(loop._data_fetcher)  # begins anew: its iterator was made before this hook
    return True


class _LookingAhead:
    """A loader whose batches come in windows; all else is the loader's own."""

    def __init__(self, loader: Any, trainer: L.Trainer, replaced: Replacement | None) -> None:
        self._loader, self._trainer, self._replaced = loader, trainer, replaced

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_loader", "_trainer", "_replaced"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        windows = self._windows()
        for window in windows if self._replaced is None else self._replaced(windows):
            self._yielding()
            yield from count_ahead(window)

    def _windows(self) -> Iterator[list[Any]]:
        iterator = iter(self._loader)
        loop = self._trainer.fit_loop
        done = loop.epoch_loop.batch_progress.current.ready
        while True:
            accumulate = self._trainer.accumulate_grad_batches
            size = min(accumulate - done % accumulate, max(1, loop.max_batches - done))
            window = list(itertools.islice(iterator, int(size)))
            if not window:
                return
            done += len(window)
            self._read()
            yield window

    def _read(self) -> None:
        """A window was read from the loader."""

    def _yielding(self) -> None:
        """The next window that was read is about to be trained on."""


class _StatefulLookingAhead(_LookingAhead):
    """Lightning saves the state of loaders that have these methods.

    A loader's own state tells what it handed out, which may be far ahead of training; so the state behind
    each window is kept until its turn comes. One that counts what training finished says it itself.
    """

    def __init__(self, loader: Any, trainer: L.Trainer, replaced: Replacement | None) -> None:
        super().__init__(loader, trainer, replaced)
        self._states: deque[dict[str, Any]] = deque()
        self._state: dict[str, Any] | None = None
        self._live = replaced is None or getattr(loader, "counts_finished", False)

    def _read(self) -> None:
        if not self._live:
            self._states.append(copy.deepcopy(self._loader.state_dict()))

    def _yielding(self) -> None:
        if self._states:
            self._state = self._states.popleft()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._loader.state_dict() if self._state is None else self._state
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)
