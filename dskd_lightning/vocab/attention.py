"""Heatmaps of a trained run's cross-model attention on given examples."""

from __future__ import annotations

from pathlib import Path

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.analysis import token_maps
from dskd_lightning.vocab.heatmap import save_heatmap

__all__ = ["draw_attention"]


def draw_attention(run: str, data: str, path: str, examples: int = 3) -> list[Path]:
    """One PNG per example: where each student token looks, byte-exact groups outlined.

    Args:
        run: a run folder of an objective with cross-model attention.
        data: file whose first examples are read, prompts included.
        path: the first PNG; others get ``-2``, ``-3`` ... before the suffix.
        examples: how many.

    Raises:
        UserError: the run can't be read, or has no cross-model attention.
    """
    from dskd_lightning.launch.trained import open_run

    cli = open_run(
        run,
        data__test=data,
        data__limit=examples,
        data__eval_batch_size=examples,
        data__teacher_cache=None,
    )
    if not cli.model.complete_teachers:
        raise UserError(f"--run: {run} learned from no teacher; there is no attention to draw.")
    cli.datamodule.setup("test")
    batch = next(iter(cli.datamodule.test_dataloader()))
    maps = token_maps(cli.model, batch, cli.datamodule.teacher_tokenizers[0])
    if not any(example.attention is not None for example in maps):
        raise UserError(f"--run: the objective of {run} has no cross-model attention to draw.")
    first, drawn = Path(path), []
    for number, example in enumerate(maps, 1):
        target = first if number == 1 else first.with_stem(f"{first.stem}-{number}")
        title = f"attention of {Path(run).name}, example {number}"
        save_heatmap(target, example.student, example.teacher, example.groups, example.attention, title=title)
        drawn.append(target)
    return drawn
