"""What settings of the data can't mean together, told before anything is read."""

from __future__ import annotations

from typing import Any

from dskd_lightning.data.sources import Sources
from dskd_lightning.errors import UserError

__all__ = ["check_disk_limit", "check_epoch", "check_lengths"]


def check_disk_limit(limit_gb: float, train: Sources | None, **together: Any) -> None:
    """Refuse what a limit on the disk rules out.

    Args:
        limit_gb: the limit.
        train: the training data.
        together: settings that need all training data on the disk together, where they aren't empty.
    """
    if not limit_gb > 0:
        raise UserError(f"`disk_limit_gb: {limit_gb}` must be above 0.")
    if found := next((name for name, value in together.items() if value not in (None, 0, {})), None):
        remedy = "name files of their own" if "split" in found else "leave it out"
        raise UserError(
            f"data.{found} needs all training data on the disk together, which disk_limit_gb rules out: "
            f"{remedy}, or drop the limit."
        )
    if train is not None and not isinstance(train, str) and not all(isinstance(e, str) for e in train):
        raise UserError("data.disk_limit_gb is for files; these training data are in memory: leave it out.")


def check_epoch(trainer: Any) -> None:
    """Refuse a Trainer that wants the same batches again, or doesn't say how many an epoch has."""
    if trainer is None:
        return
    if trainer.overfit_batches:
        raise UserError(
            "data.disk_limit_gb: training reads other files all the time, so trainer.overfit_batches can't "
            "mean the same batches again: leave one of them out."
        )
    if isinstance(trainer.limit_train_batches, float):
        raise UserError(
            "data.disk_limit_gb: nobody knows how many batches the training files hold before all were "
            "read: say with trainer.limit_train_batches how many are an epoch."
        )


def check_lengths(max_length: int, max_prompt_length: int, max_tokens: int | None, teacher_room: int) -> None:
    """Refuse lengths that leave no room."""
    if teacher_room < 0:
        raise UserError(
            f"`max_teacher_prompt_length` is below `max_prompt_length: {max_prompt_length}`: raise it."
        )
    if max_prompt_length < 1:
        raise UserError(f"`max_prompt_length: {max_prompt_length}` must be at least 1.")
    if max_prompt_length >= max_length:
        raise UserError(
            f"`max_prompt_length: {max_prompt_length}` leaves no room for a response in `max_length: "
            f"{max_length}`: make it smaller, or `max_length` larger."
        )
    longest = max_length + teacher_room
    if max_tokens is not None and max_tokens < longest:
        raise UserError(
            f"`max_tokens_per_batch: {max_tokens}` is less than one example of `max_length: {longest}`"
            f"{', what teachers read more included' if teacher_room else ''}: make it at least that."
        )
