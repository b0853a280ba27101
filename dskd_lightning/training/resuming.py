"""Where in training a checkpoint stands, in the one form from which Lightning goes on exactly."""

from __future__ import annotations

from typing import Any

__all__ = ["settle_progress"]

_CURRENT_EPOCH_ONLY = (
    ("epoch_loop.scheduler_progress",),
    ("epoch_loop.automatic_optimization.optim_progress", "optimizer", "step"),
    ("epoch_loop.automatic_optimization.optim_progress", "optimizer", "zero_grad"),
)


def settle_progress(loop: dict[str, Any], steps: int, accumulate: int, by_steps: bool) -> None:
    """Rewrite a checkpoint's progress of the fit loop, in place.

    Lightning saves its counters as they are in the midst of a hook and guesses on loading which hook
    that was. It takes an epoch that ``max_steps`` or an early stop cut short for a whole one, counts a
    step twice where a batch had begun, and under ``max_steps`` trains the next epoch's first batch
    as one more of the finished epoch. What it restores exactly is a save at the end of a batch with others
    behind it, so every place becomes one: that many batches of that epoch are done, validation included.
    Gradients of a part of a step are in no checkpoint, so a step that had begun begins again.
    Only finished epochs stay as they are where epochs are counted, so that epoch hooks run.

    Args:
        loop: ``checkpoint["loops"]["fit_loop"]``.
        steps: the checkpoint's optimiser steps.
        accumulate: batches per optimiser step.
        by_steps: whether ``max_steps`` is set.
    """
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    current = batches["current"]
    if not epochs["current"]["ready"]:
        return  # nothing was trained
    begun = current["ready"] > current["processed"]  # the last flag is that batch's
    whole = batches["is_last_batch"] and not begun
    inside = epochs["current"]["processed"] < epochs["current"]["ready"]
    if whole and (inside or not by_steps):
        return
    again = 0 if whole else current["processed"] % accumulate
    done = 0 if whole else current["processed"] - again
    total = batches["total"]["processed"] - again
    for progress in (epochs["total"], epochs["current"]):
        ready = progress["ready"] + whole
        progress.update(ready=ready, started=ready, processed=ready - 1, completed=ready - 1)
    for progress, processed in ((batches["total"], total), (current, done)):
        progress.update(ready=processed, started=processed, processed=processed, completed=processed - 1)
    batches["is_last_batch"] = False
    for loader in loop["state_dict"].get("combined_loader", ()):
        if "position" in loader:
            loader["position"] = done  # it may have counted a batch that was handed out and not trained on
    if whole:
        for first, *path in _CURRENT_EPOCH_ONLY:
            progress = loop[first]
            for key in path:
                progress = progress[key]
            progress["current"] = dict.fromkeys(progress["current"], 0)
    if again:
        optimizer = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for part, zeroed in optimizer["zero_grad"].items():
            zeroed.update(dict.fromkeys(zeroed, optimizer["step"][part]["completed"]))
    # Lightning adds the step of the batch that it takes to be unfinished.
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1
