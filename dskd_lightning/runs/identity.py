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
    checkpoint: str | os.PathLike[str] | None,
    step: int,
    digest: str | None = None,
) -> dict[str, Any]:
    """Digests in 16 hexadecimal digits, None for what there isn't.

    Args:
        output: the run folder.
        checkpoint: what was read; None for a model that was just trained, or never.
        step: the optimiser steps it was trained.
        digest: of the checkpoint when it was read; None for the one that it has now.
    """
    from dskd_lightning.checkpoints import digest_of  # with torch, which lists and help do without

    config = Path(output) / "config.yaml"
    settings = hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.is_file() else None
    name = None if checkpoint is None else Path(checkpoint).name
    content = digest or (None if checkpoint is None else digest_of(checkpoint))
    return {"checkpoint": name, "digest": content, "step": step, "config": settings}
