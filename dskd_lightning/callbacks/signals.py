"""Signals that tell a run to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

__all__ = ["SignalStop"]

logger = logging.getLogger(__name__)


class SignalStop(L.Callback):
    """Ends a fit on SIGTERM or SIGINT with a checkpoint, and with a status that says it was stopped.

    The signal is noted, whichever rank it reaches, and all ranks save and end before the next optimiser
    step, with the status 128 + signal. A second SIGINT ends at once. Where Lightning would requeue a
    SLURM job (SIGUSR1 before the time limit), that happens then. Training that has no step left
    ends as if it had not been told. SIGTERM to another function of the Trainer ends it at once.

    Whatever ends the first rank ends those that it started: alone they would wait for it in a collective
    operation, or to join it, for minutes.

    Lightning's own handlers talk to the other ranks from within the handler, which hangs them; on SLURM they
    save in the middle of whatever runs.

    Args:
        checkpoint: where to save; None saves nothing.
    """

    patience = 10.0
    """Seconds in which the other ranks may end by themselves."""

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self.checkpoint = checkpoint
        self._told: set[int] = set()
        self._requeue: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._told.clear()  # an earlier function of the Trainer may have been told

    # Lightning sets its handlers after all hooks of the setup, and takes all of them back in the end.

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watch(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watch(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._end_on_sigterm(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_on_sigterm(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_on_sigterm(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients of a part of a step are in no checkpoint
        number = self._agree(trainer)
        if not number:
            return
        for log in trainer.loggers:
            log.save()
        if self.checkpoint is not None:
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
        if trainer.is_global_zero:
            how = "nothing is saved" if self.checkpoint is None else "resume with --ckpt_path last"
            name = signal.Signals(number).name
            logger.warning("stopped by %s after step %d; %s", name, trainer.global_step, how)
            if number == self._requeue:
                _requeue()
        raise SystemExit(128 + number)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        launcher = trainer.strategy.launcher
        if not isinstance(launcher, _SubprocessScriptLauncher) or isinstance(exception, KeyboardInterrupt):
            return  # an interrupt is Lightning's
        processes = list(launcher.procs)
        launcher.procs.clear()  # or Lightning's observer kills this one where another was faster to end
        end = time.monotonic() + self.patience
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, end - time.monotonic()))
            process.kill()

    def _watch(self, trainer: L.Trainer) -> None:
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = environment.requeue_signal
        for number in (signal.SIGTERM, signal.SIGINT, self._requeue):
            if number is not None and threading.current_thread() is threading.main_thread():
                signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._told:
            raise KeyboardInterrupt
        self._told.add(number)

    def _agree(self, trainer: L.Trainer) -> int:
        """The signal that any rank was told, 0 without; one that requeues goes before others."""
        told = max(self._told, key=lambda number: (number == self._requeue, number), default=0)
        if trainer.world_size == 1:
            return told
        ranks = torch.zeros(trainer.world_size, dtype=torch.int64, device=trainer.strategy.root_device)
        ranks[trainer.global_rank] = told
        numbers: list[int] = trainer.strategy.reduce(ranks, reduce_op="sum").tolist()  # type: ignore[union-attr]
        return max(numbers, key=lambda number: (number == self._requeue, number))

    def _end_on_sigterm(self, trainer: L.Trainer) -> None:
        def end(number: int, _: FrameType | None) -> None:
            if (launcher := trainer.strategy.launcher) is not None:
                launcher.kill(signal.Signals(number))
            raise SystemExit(128 + number)

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, end)


def _requeue() -> None:
    """Put this SLURM job back into the queue."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    status = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    if status:
        logger.warning("scontrol could not requeue job %s: status %d", job, status)
