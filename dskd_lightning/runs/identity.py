"""Which model a result is of: the checkpoint's content, its step and the run's configuration."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

__all__ = ["MODEL_KEY", "model_identity"]

MODEL_KEY = "model"
"""Under which result files name their model."""


def model_identity(
    output: str | os.PathLike[str],
    step: int,
    checkpoint: str | os.PathLike[str] | None = None,
    digest: str | None = None,
) -> dict[str, Any]:
    """Digests in 16 hexadecimal digits, None for what there isn't.

    Args:
        output: the run folder.
        step: the optimiser steps it was trained.
        checkpoint: what was read; None for a model that was just trained, or never.
        digest: of the checkpoint when it was read.
    """
    config = Path(output) / "config.yaml"
    settings = hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.is_file() else None
    name = None if checkpoint is None else Path(checkpoint).name
    return {"checkpoint": name, "digest": digest, "step": step, "config": settings}
