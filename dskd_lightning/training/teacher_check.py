"""Whether the teacher has something to teach: its likelihood of the validation set beside the student's."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dskd_lightning.modes import evaluating
from dskd_lightning.structures import DistillationBatch, Ratio
from dskd_lightning.training.fidelity import nats_per_byte
from dskd_lightning.training.meter import RatioMeter

if TYPE_CHECKING:
    from dskd_lightning.module import DistillationModule

__all__ = ["TeacherCheck"]


class TeacherCheck(L.Callback):
    """Measures both models' nats per byte of the validation responses before training, and warns.

    Logs ``start/nll_per_byte`` and ``start/teacher_nll_per_byte`` once, and the teacher's beside each
    validation's ``val/nll_per_byte`` as ``val/teacher_nll_per_byte``. A teacher that predicts the data worse
    than the student does, at first or later, has nothing to teach of them; a sentence says so once. Nothing
    is measured without a validation set or a teacher with weights; of several teachers the first is.

    Args:
        enabled: False measures nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._teacher: float | None = None
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self._teacher, "warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._teacher, self._warned = state_dict["teacher"], state_dict["warned"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = cast("DistillationModule", pl_module)
        if not self.enabled or self._teacher is not None or not module.has_teacher_states:
            return
        found = self._measured(trainer, module)
        if not found:
            return
        student, self._teacher = found["nll_per_byte"], found["teacher_nll_per_byte"]
        values = {f"start/{name}": value for name, value in found.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        rank_zero_info(
            f"Before training, nats per byte of the validation responses: student {student:.3f}, teacher "
            f"{self._teacher:.3f}."
        )
        self._compare(student)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._teacher is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        pl_module.log("val/teacher_nll_per_byte", self._teacher, batch_size=1)
        student = trainer.callback_metrics.get("val/nll_per_byte")
        if student is not None:
            self._compare(float(student))

    def _compare(self, student: float) -> None:
        teacher = cast("float", self._teacher)
        if student >= teacher or self._warned:
            return
        self._warned = True
        rank_zero_warn(
            f"The student predicts the validation responses better ({student:.3f} nats per byte) than its "
            f"teacher ({teacher:.3f}), which has little to teach of them: fine-tune the teacher on such data "
            "first, take a better one, or train on responses that it generates (`dskd generate`)."
        )

    def _measured(self, trainer: L.Trainer, module: DistillationModule) -> dict[str, float]:
        """Of all ranks' validation batches, nothing where there are none."""
        loader, count = _batches(trainer)
        if not count:
            return {}
        meter = RatioMeter()

        def measure() -> None:
            for batch in islice(loader, count):
                meter.update(_likelihoods(module, batch.to(module.device)))

        with torch.no_grad(), evaluating(module):
            module.as_step(measure)
        ratios = meter.reduce(module._all_reduce)
        return {name: float(ratio.value) for name, ratio in ratios.items()}


def _batches(trainer: L.Trainer) -> tuple[Iterable[DistillationBatch], int]:
    """A validation loader and how many of its batches a validation reads."""
    if not trainer.enable_validation:
        return [], 0
    trainer.fit_loop.epoch_loop.val_loop.setup_data()
    counts, loader = trainer.num_val_batches, trainer.val_dataloaders
    if not counts or not isinstance(counts, list) or len(counts) != 1 or not 0 < counts[0] < float("inf"):
        return [], 0
    return cast("Any", loader), int(counts[0])


def _likelihoods(module: DistillationModule, batch: DistillationBatch) -> dict[str, Ratio]:
    student, teacher = module.student_side(batch.student), module.answer_of(0, batch)
    return {
        "nll_per_byte": nats_per_byte(student, batch.response_bytes),
        "teacher_nll_per_byte": nats_per_byte(teacher, batch.response_bytes, batch.answers(0)),
    }
