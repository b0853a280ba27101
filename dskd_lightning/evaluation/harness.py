"""Standard benchmarks of an exported student through lm-evaluation-harness."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dskd_lightning.errors import UserError

__all__ = ["run_harness"]


def run_harness(
    folder: str | os.PathLike[str], tasks: Sequence[str], *, batch_size: int | str = "auto", **options: Any
) -> dict[str, float]:
    """Evaluate a folder made by ``dskd export`` on tasks of lm-evaluation-harness.

    Args:
        folder: a plain Hugging Face folder.
        tasks: task names of the harness.
        batch_size: as the harness takes it.
        options: further arguments of ``lm_eval.simple_evaluate``.

    Returns:
        ``task/metric`` -> value.

    Raises:
        UserError: the harness is not installed, there is no task or no model in the folder.
    """
    if not tasks:
        raise UserError("lm-evaluation-harness: name at least one task, e.g. arc_easy.")
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: is no exported model (no config.json); make one with `dskd export`.")
    if find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; install it with: pip install 'lm_eval[hf]'")
    from lm_eval import simple_evaluate  # type: ignore[import-not-found,unused-ignore]

    output = simple_evaluate(
        model="hf", model_args=f"pretrained={folder}", tasks=list(tasks), batch_size=batch_size, **options
    )
    return {
        f"{task}/{metric}": float(value)
        for task, values in output["results"].items()
        for metric, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
