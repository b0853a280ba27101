"""Batches of one rank, resumable in mid-epoch."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from dskd_lightning.data.batching import PLAN_VERSION, BatchPlan, BatchSettings, plan_batches
from dskd_lightning.data.collate import Collator
from dskd_lightning.data.mixing import Mixture
from dskd_lightning.errors import UserError
from dskd_lightning.structures import DistillationBatch

__all__ = ["DistillationLoader"]

_SAMPLES = 512  # examples whose tokens tell data apart


class DistillationLoader:
    """Yields the `DistillationBatch`\\ es of one rank.

    Not a ``DataLoader``, so that Trainer neither wraps nor rebuilds it: it knows its rank itself.
    ``batch_sampler.sampler.set_epoch`` and ``state_dict`` are how Lightning tells it the epoch and
    saves its position. What the epoch's batches are is settled at the first ``next``, since
    Lightning makes the iterator before it announces the epoch.

    Args:
        collator: turns rows into batches, and holds the dataset.
        indices: rows of the dataset to use.
        settings: how batches are built.
        shuffle: a new order each epoch.
        seed: of that order.
        rank: this process's.
        ranks: number of processes.
        num_workers: processes that build batches ahead; 0 builds them in this one.
        pin_memory: page-locked batches; None where CUDA is.
        mixture: who of ``indices`` takes which place of an epoch; None for each of them once.
        processed: number of batches of this epoch that training has finished. Without it, a
            batch counts as finished when it was handed out.

    Attributes:
        waited: seconds that whoever iterates has waited for batches so far.
    """

    def __init__(
        self,
        collator: Collator,
        indices: npt.NDArray[np.intp],
        settings: BatchSettings,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        mixture: Mixture | None = None,
        processed: Callable[[], int] | None = None,
    ) -> None:
        self.collator, self.indices, self.settings = collator, indices, settings
        self.shuffle, self.seed, self.rank, self.ranks = shuffle, seed, rank, ranks
        self.num_workers, self._processed = num_workers, processed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.epoch = 0
        self.waited = 0.0
        self.mixture = mixture
        self._lengths = collator.dataset.longest(indices) if mixture is None else mixture.lengths
        self._teachers = self._teachers_of_places()
        self._position = 0
        self._resume: tuple[int, int] | None = None
        self._plan: tuple[int, BatchPlan] | None = None

    @property
    def counts_finished(self) -> bool:
        """Whether `state_dict` tells what training has finished, however far it was read ahead."""
        return self._processed is not None

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Lightning announces the epoch through ``batch_sampler.sampler.set_epoch``."""
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def batches(self) -> BatchPlan:
        """This rank's batches of the present epoch, as rows of the prepared dataset's indices."""
        if self._plan is None or self._plan[0] != self.epoch:
            plan = plan_batches(
                self._lengths, self.settings, seed=self.seed, epoch=self.epoch, shuffle=self.shuffle,
                groups=self._teachers,
            )  # fmt: skip
            rows: npt.NDArray[np.integer] = self.indices
            if self.mixture is not None:
                rows = self.mixture.of_epoch(self.epoch if self.shuffle else 0)
            self._plan = (self.epoch, plan.of_rank(self.rank, self.ranks).renamed(rows))
        return self._plan[1]

    def __len__(self) -> int:
        return len(self.batches())

    def __iter__(self) -> Iterator[DistillationBatch]:
        batches = self.batches()
        resume, self._resume = self._resume, None
        start = resume[1] if resume is not None and resume[0] == self.epoch else 0
        if start >= len(batches):
            start = 0
        self._position = start
        loader: DataLoader[DistillationBatch] = DataLoader(
            _Batches(self.collator, batches[start:]),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(self.seed),  # leave the global one to training
        )
        ready = _plain_errors(loader)
        while (batch := self._next(ready)) is not None:
            self._position += 1
            yield batch

    def _next(self, batches: Iterator[DistillationBatch]) -> DistillationBatch | None:
        begin = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - begin
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of finished batches, in plain types."""
        position = self._position if self._processed is None else self._processed()
        return {"epoch": self.epoch, "position": position, "key": self.key}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the saved position.

        Raises:
            UserError: data, seed, batch settings or the number of processes differ.
        """
        if state["key"] != self.key:
            raise UserError(
                "The checkpoint was saved with other training data, seed, batch settings or number of "
                "processes, so its place in the epoch is meaningless: restore those, or start from its "
                "weights alone with `--model.weights_from`."
            )
        self._resume = (int(state["epoch"]), int(state["position"]))

    def _teachers_of_places(self) -> npt.NDArray[np.int16] | None:
        if self.collator.teachers is None:
            return None
        mixture = self.mixture
        return self.collator.teachers[self.indices if mixture is None else mixture.rows[mixture.starts[:-1]]]

    @functools.cached_property
    def key(self) -> str:
        """Of the data, their order and the batches: a place means the same where keys are equal."""
        content = hashlib.sha256(np.ascontiguousarray(self._lengths).tobytes())
        content.update(np.ascontiguousarray(self.indices).tobytes())
        if self.mixture is not None:
            for array in (self.mixture.rows, self.mixture.starts):
                content.update(np.ascontiguousarray(array).tobytes())
        if self._teachers is not None:
            content.update(self._teachers.tobytes())
        for index in self.indices[:: max(1, len(self.indices) // _SAMPLES)].tolist():
            # Of other texts or templates, too, which may be as long.
            example = self.collator.dataset.rendered(index)
            content.update(np.ascontiguousarray(example.input_ids).tobytes())
            content.update(np.ascontiguousarray(example.labels).tobytes())
        what = (PLAN_VERSION, astuple(self.settings), self.shuffle, self.seed, self.ranks)
        content.update(repr(what).encode())
        return content.hexdigest()[:16]


def _plain_errors(loader: DataLoader[DistillationBatch]) -> Iterator[DistillationBatch]:
    """The batches; PyTorch wraps the sentence of a worker's `UserError` into its traceback."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error


class _Batches(Dataset[DistillationBatch]):
    """Whole batches as items, so that workers build them."""

    def __init__(self, collator: Collator, batches: BatchPlan) -> None:
        self.collator, self.batches = collator, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> DistillationBatch:
        return self.collator(self.batches[index])
