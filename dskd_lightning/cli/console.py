"""What reaches the terminal: our messages, and of the libraries' only those a user can act on."""

from __future__ import annotations

import logging
import sys
import warnings

__all__ = ["configure_output"]

_EXPECTED = (
    r"LightningCLI's args parameter is intended",  # we pass the arguments on purpose
    r"Found \d+ module\(s\) in eval mode",  # the teacher
    r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    r"The '\w+_dataloader' does not have many workers",  # batches are prepared on disk
    r"Experiment logs directory .* exists and is not empty",  # a run folder is one run
    r"Checkpoint directory .* exists and is not empty",
)


class _WithoutAdverts(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "Tip:" not in record.getMessage()


def configure_output() -> None:
    """Show our own log messages plainly on standard error, and hide expected warnings."""
    logger = logging.getLogger("dskd_lightning")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer"):
        logging.getLogger(name).addFilter(_WithoutAdverts())
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message)
