"""Throughput, memory and early warnings while training."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from dskd_lightning.functional.spectrum import effective_rank
from dskd_lightning.memory import peak_memory_bytes
from dskd_lightning.ranks import whole
from dskd_lightning.structures import DistillationBatch

__all__ = ["TrainingMonitor"]


class TrainingMonitor(L.Callback):
    """Logs tokens per second and memory, and warns when training has gone wrong quietly.

    Args:
        min_student_entropy: nats; below it the student repeats itself with certainty.
        min_projector_rank: effective rank of a projector's weight over its smaller side, below
            which its output no longer tells hidden states apart.
        check_every: optimiser steps between the checks of projectors.
    """

    def __init__(
        self, min_student_entropy: float = 0.05, min_projector_rank: float = 0.02, check_every: int = 50
    ) -> None:
        self.min_student_entropy = min_student_entropy
        self.min_projector_rank = min_projector_rank
        self.check_every = check_every
        self._tokens = 0
        self._since = 0.0
        self._last_step = -1
        self._warned: set[str] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tokens, self._since = 0, time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: DistillationBatch,
        batch_idx: int,
    ) -> None:
        self._tokens += batch.student.input_ids.numel()
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if trainer.global_step % self.check_every == 0:
            self._check_projectors(pl_module)
        if trainer.global_step % max(trainer.log_every_n_steps, 1):  # type: ignore[attr-defined]
            return  # figures that nobody logs would make the host wait for its GPU
        now = time.perf_counter()
        values = {
            "monitor/tokens_per_second": self._tokens / max(now - self._since, 1e-9),
            "monitor/memory_gib": peak_memory_bytes() / 2**30,
        }
        # Tensors: Lightning would bring numbers to the device, and wait for them there.
        pl_module.log_dict({name: torch.tensor(value) for name, value in values.items()}, batch_size=1)
        self._tokens, self._since = 0, now
        self._check_entropy(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()  # validation is not training time

    def _check_entropy(self, trainer: L.Trainer) -> None:
        entropy = trainer.callback_metrics.get("train/student_entropy")
        if entropy is not None and float(entropy) < self.min_student_entropy:
            self._warn(
                "entropy",
                f"The student's entropy is {float(entropy):.3f} nats: it answers with near certainty. "
                "Lower the learning rate or take forward_kl.",
            )

    def _check_projectors(self, module: L.LightningModule) -> None:
        for name, parameter in module.named_parameters():
            if name.startswith("objectives.") and parameter.ndim == 2 and min(parameter.shape) > 1:
                rank = float(effective_rank(whole(parameter.detach()))) / min(parameter.shape)
                if rank < self.min_projector_rank:
                    self._warn(
                        name,
                        f"{name} has collapsed to {rank:.1%} of its rank; lower model.projector_lr.",
                    )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            rank_zero_warn(message)
