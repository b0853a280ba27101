"""Throughput, memory and early warnings while training."""

from __future__ import annotations

import time
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from dskd_lightning.functional.spectrum import effective_rank
from dskd_lightning.memory import peak_memory_bytes
from dskd_lightning.ranks import whole
from dskd_lightning.structures import DistillationBatch
from dskd_lightning.training.length import total_steps
from dskd_lightning.training.projected_trend import ProjectedTrend

__all__ = ["TrainingMonitor"]


_WORTH_A_WORD = 60.0  # seconds of waiting for batches
_LEAST_PATIENCE = 30.0  # steps before which no projector has had its chance


@runtime_checkable
class _CountsWaiting(Protocol):
    """A loader that says how many seconds training has waited for its batches."""

    waited: float


class TrainingMonitor(L.Callback):
    """Logs tokens per second and memory, and warns when training has gone wrong quietly.

    Args:
        min_student_entropy: nats; below it the student repeats itself with certainty.
        min_projector_rank: effective rank of a projector's weight over its smaller side, below
            which its output no longer tells hidden states apart.
        check_every: optimiser steps between the checks of projectors.
        max_projector_rise: share by which the projected teacher's cross-entropy may rise above its first.
        min_partner_attention: share of the attention between tokenisations that the byte-exact partner must
            have once projectors have had time to learn.
        patience: optimiser steps that they have, for this, to predict half of the teacher's choices and to
            come back from a rise (twice as many where it is falling); a third of the training where that is
            shorter, and at least 30.
        max_data_wait: share of its time that training may wait for batches, once it has lost a minute.
    """

    def __init__(
        self,
        min_student_entropy: float = 0.05,
        min_projector_rank: float = 0.02,
        check_every: int = 50,
        max_projector_rise: float = 0.2,
        min_partner_attention: float = 0.1,
        patience: int = 200,
        max_data_wait: float = 0.1,
    ) -> None:
        self.min_student_entropy = min_student_entropy
        self.min_projector_rank = min_projector_rank
        self.check_every = check_every
        self.patience, self.max_data_wait = patience, max_data_wait
        self._patience = float(patience)
        self._trend = ProjectedTrend(max_projector_rise, min_partner_attention)
        self._tokens = 0
        self._since = self._waited = 0.0
        self._waits: list[float] = []
        self._last_step = -1
        self._warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        return {"projected": self._trend.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._trend.state = state_dict["projected"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tokens, self._since, self._waited = 0, time.perf_counter(), _waited(trainer)
        steps = total_steps(trainer)
        self._patience = min(self.patience, max(steps / 3, _LEAST_PATIENCE)) if steps >= 0 else self.patience

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
        logged = trainer.global_step % max(trainer.log_every_n_steps, 1) == 0  # type: ignore[attr-defined]
        if logged or all(value.device.type == "cpu" for value in trainer.callback_metrics.values()):
            self._check_entropy(trainer)
            self._check_projected(trainer, pl_module)
        if not logged:
            return  # figures that nobody logs would make the host wait for its GPU
        now = time.perf_counter()
        seconds, waited = max(now - self._since, 1e-9), _waited(trainer)
        values = {
            "monitor/tokens_per_second": self._tokens / seconds,
            "monitor/memory_gib": peak_memory_bytes() / 2**30,
            "monitor/data_wait": (waited - self._waited) / seconds,
        }
        # Tensors: Lightning would bring numbers to the device, and wait for them there.
        pl_module.log_dict({name: torch.tensor(value) for name, value in values.items()}, batch_size=1)
        self._tokens, self._since, self._waited = 0, now, waited
        self._check_waiting(values["monitor/data_wait"], waited)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since, self._waited = time.perf_counter(), _waited(trainer)  # validation is not training time

    def _check_waiting(self, share: float, seconds: float) -> None:
        self._waits = [*self._waits, share][-10:]
        usual = sum(self._waits) / len(self._waits)
        if usual > self.max_data_wait and seconds > _WORTH_A_WORD:
            self._warn(
                "waiting",
                f"Training waits for its batches {usual:.0%} of the time (monitor/data_wait): raise "
                "data.num_workers, which build them ahead, or keep data and teacher cache on a faster disk.",
            )

    def _check_entropy(self, trainer: L.Trainer) -> None:
        entropy = trainer.callback_metrics.get("train/student_entropy")
        if entropy is not None and float(entropy) < self.min_student_entropy:
            self._warn(
                "entropy",
                f"The student's entropy is {float(entropy):.3f} nats: it answers with near certainty. "
                "Lower the learning rate or take forward_kl.",
            )

    def _check_projected(self, trainer: L.Trainer, module: Any) -> None:
        found = self._trend.look(
            trainer.callback_metrics,
            trainer.global_step,
            self._patience,
            list(getattr(module, "objectives", ())),
        )
        for name, message in found.items():
            self._warn(name, message)

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


def _waited(trainer: L.Trainer) -> float:
    """Seconds that training has waited for batches; 0 where its loader doesn't say."""
    loader = trainer.train_dataloader
    return loader.waited if isinstance(loader, _CountsWaiting) else 0.0
