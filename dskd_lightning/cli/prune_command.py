"""`dskd prune`: how good, large and fast a model is with fewer layers, and one of the sizes as a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from dskd_lightning.errors import UserError
from dskd_lightning.files import write_atomic
from dskd_lightning.models.export import check_export, export_student
from dskd_lightning.planning.pruned_sizes import PrunedSize, PruningStudy
from dskd_lightning.runs.tables import number_tables

__all__ = ["run_prune"]


def run_prune(
    study: PruningStudy, output: str | None, layers: int | None, sizes: list[int] | None, overwrite: bool
) -> None:
    """Measure the sizes, print the table, and write the one with ``layers`` to ``output``.

    Raises:
        UserError: one of ``output`` and ``layers`` is given without the other, or the folder is in use.
    """
    if (output is None) != (layers is None):
        raise UserError(
            "dskd prune: --output and --layers go together: where a student is written, and how large."
        )
    if output is not None:
        check_export(output, overwrite)
    counts = sorted(
        {study.total, *(sizes or study.usual_sizes()), *([] if layers is None else [layers])}, reverse=True
    )
    found: list[PrunedSize] = []
    written = None
    for size, model in study.sizes(counts):
        found.append(size)
        print(f"{len(size.layers)} layers: perplexity {size.perplexity:,.2f}", flush=True)
        if output is not None and len(size.layers) == layers:
            model.to(study.stored_dtype)  # type: ignore[arg-type]
            written = export_student(model, study.tokenizer, output, overwrite=overwrite)
    _show(found)
    if written is None:
        print("write one of them with --output FOLDER --layers N")
        return
    chosen = next(size for size in found if len(size.layers) == layers)
    record = {
        "source": study.source,
        "data": study.data,
        "by": study.by,
        "scores": None if not study.scores else study.scores,
        "layers": chosen.layers,
        "intermediate_size": study.intermediate_size,
        "sizes": [asdict(size) for size in found],
    }
    write_atomic(Path(written) / "pruning.json", json.dumps(record, indent=1) + "\n")
    print(f"{len(chosen.layers)} layers written to {written}: {list(chosen.layers)}")
    print(f"next: dskd fit --config YOURS --model.student.source {written} (without student.prune)")


def _show(sizes: Sequence[PrunedSize]) -> None:
    slowest = sizes[0].tokens_per_second
    rows = [
        (
            str(len(size.layers)),
            f"{size.parameters / 1e6:,.1f}",
            f"{size.bytes / 2**20:,.0f}",
            f"{size.tokens_per_second:,.0f}",
            f"{size.tokens_per_second / slowest:.2f}",
            f"{size.perplexity:,.2f}",
        )
        for size in sizes
    ]
    headings = ("layers", "million parameters", "MiB", "tokens/s", "speed", "perplexity before training")
    console = Console()
    for table in number_tables(headings, rows, console.width):
        console.print(table)
