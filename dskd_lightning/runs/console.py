"""What reaches the terminal: our messages, and of the libraries' only those a user can act on."""

from __future__ import annotations

import logging
import sys
import warnings

from dskd_lightning.runs.text import visible

__all__ = ["configure_output"]

_EXPECTED = (
    r"LightningCLI's args parameter is intended",  # we pass the arguments on purpose
    r"Found \d+ module\(s\) in eval mode",  # the teacher
    r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    r"The '\w+_dataloader' does not have many workers",  # batches are prepared on disk
    r"Experiment logs directory .* exists and is not empty",  # a run folder is one run
    r"Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed from",  # a run resumed in another folder starts its own list of checkpoints
    r"It is recommended to use `self.log\('[^']+', ..., sync_dist=True\)`",  # sums are over ranks already
    r"You're using the WeightAveraging callback with a model that overrides",  # sharding refuses it
)


class _StandardError(logging.StreamHandler):
    """Writes to whatever ``sys.stderr`` is at the time, which notebooks and tests replace.

    Messages quote data and models, whose control characters must not reach the terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        if "Tip:" not in record.getMessage():  # Lightning advertises
            self.stream = sys.stderr
            super().emit(record)


def configure_output() -> None:
    """Show log messages plainly on standard error, and hide expected warnings."""
    for name in ("dskd_lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [_StandardError()]
    # Imported by peft wherever it is installed, it tells of optional kernels that it hasn't found.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message)
