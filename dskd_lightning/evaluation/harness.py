"""Standard benchmarks of an exported student through lm-evaluation-harness."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dskd_lightning.errors import UserError

__all__ = ["run_harness"]


def run_harness(
    folder: str | os.PathLike[str],
    tasks: Sequence[str],
    *,
    batch_size: int | str = "auto",
    include_path: str | os.PathLike[str] | None = None,
    device: str | None = None,
    **options: Any,
) -> dict[str, float]:
    """Evaluate a folder made by ``dskd export`` on tasks of lm-evaluation-harness.

    Args:
        folder: a plain Hugging Face folder.
        tasks: task names of the harness.
        batch_size: as the harness takes it.
        include_path: folder of task files of your own, beside the harness's.
        device: where it runs; None takes the GPU where there is one.
        options: further arguments of ``lm_eval.simple_evaluate``.

    Returns:
        ``task/metric`` -> value.

    Raises:
        UserError: the harness is not installed, there is no such task or no model in the folder.
    """
    if not tasks:
        raise UserError("lm-evaluation-harness: name at least one task, e.g. arc_easy.")
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: is no exported model (no config.json); make one with `dskd export`.")
    if find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; install it with: pip install 'lm_eval[hf]'")
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"lm-evaluation-harness: {include_path} is no folder of task files.")
    from lm_eval import simple_evaluate  # type: ignore[import-not-found,unused-ignore]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found,unused-ignore]

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"lm-evaluation-harness knows no task {', '.join(unknown)}; list them with `lm_eval ls tasks`, "
            "or give your own files' folder as include_path."
        )
    output = simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder}",
        tasks=list(tasks),
        batch_size=batch_size,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        task_manager=manager,
        **options,
    )
    return {
        f"{task}/{metric}": float(value)
        for task, values in output["results"].items()
        for metric, value in values.items()
        if "," in metric and isinstance(value, (int, float))  # "acc,none": a metric and its filter
    }
