"""Progress where no terminal shows a bar: under nohup, SLURM and CI."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from dskd_lightning.runs.heartbeat import Heartbeat, duration
from dskd_lightning.structures import DistillationBatch
from dskd_lightning.training.length import total_steps

__all__ = ["ProgressLines"]


@dataclass
class _Part:
    """Something with a beginning and a number of steps."""

    name: str
    since: float
    total: float
    done: int = 0
    first: int = 0

    def left(self, now: float) -> str:
        """``2 min 5 s left``, or how long it has taken where that is all one knows."""
        done = self.done - self.first
        left = duration((now - self.since) / done * (self.total - self.done)) if done else ""
        return f"{left} left" if left else f"{duration(now - self.since)} so far"

    def count(self) -> str:
        return f"{self.done:,} of {self.total:,.0f}" if math.isfinite(self.total) else f"{self.done:,}"


class ProgressLines(ProgressBar):
    """A log line at least every ``seconds``: step, loss, tokens per second, time left.

    The first optimiser step gets a line at once, so that a log shows early what a run will take.

    Args:
        seconds: between two lines.
        clock: seconds.
    """

    def __init__(self, seconds: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._beat = Heartbeat(self.line, seconds)
        self._clock = clock
        self._enabled = True
        self._fit: _Part | None = None
        self._evaluation: _Part | None = None
        self._tokens, self._seconds, self._batch_since = 0, 0.0, 0.0

    def disable(self) -> None:
        """No lines: on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Lines again."""
        self._enabled = True

    def line(self) -> str:
        """How far the trainer is now; empty between its loops."""
        now, part = self._clock(), self._evaluation
        if part is not None:
            return f"{part.name}: batch {part.count()}, {part.left(now)}"
        if self._fit is None:
            return ""
        trainer = self.trainer
        parts = [f"fit: step {self._fit.count()}"]
        if trainer.max_epochs and trainer.max_epochs > 0:
            parts.append(
                f"epoch {min(trainer.current_epoch + 1, trainer.max_epochs)} of {trainer.max_epochs}"
            )
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            parts.append(f"loss {float(loss):.4g}")
        if self._seconds:
            parts.append(f"{self._tokens / self._seconds:,.0f} tokens/s")
        return ", ".join([*parts, self._fit.left(now)])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, total = trainer.global_step, total_steps(trainer)
        self._fit = _Part("fit", self._clock(), total, step, step)
        self._tokens, self._seconds = 0, 0.0
        self._start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_since = self._clock()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: DistillationBatch,
        batch_idx: int,
    ) -> None:
        assert self._fit is not None
        self._tokens += batch.student.input_ids.numel() * trainer.world_size
        self._seconds += (
            self._clock() - self._batch_since
        )  # without waiting for data, validation, checkpoints
        first = self._fit.done == self._fit.first
        self._fit.done = trainer.global_step
        if first and self._fit.done > self._fit.first and self._enabled:
            self._beat.say()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._beat.stop()
        if self._enabled:
            self._beat.say()
        self._fit = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(
            "validation",
            trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches,
        )

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("predict", trainer.num_predict_batches)

    def on_validation_batch_end(self, *_: Any) -> None:
        self._count()

    def on_test_batch_end(self, *_: Any) -> None:
        self._count()

    def on_predict_batch_end(self, *_: Any) -> None:
        self._count()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_evaluation()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._beat.stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._beat.stop()

    def _begin(self, name: str, batches: Any) -> None:
        total = float(sum(batches)) if isinstance(batches, list) else float(batches)
        self._evaluation = _Part(name, self._clock(), total)
        if self._fit is None:
            self._start()

    def _count(self) -> None:
        if self._evaluation is not None:
            self._evaluation.done += 1
            if self._evaluation.done >= self._evaluation.total:  # what follows tells of itself
                self._end_evaluation()

    def _end_evaluation(self) -> None:
        self._evaluation = None
        if self._fit is None:
            self._beat.stop()

    def _start(self) -> None:
        if self._enabled:
            self._beat.start()
