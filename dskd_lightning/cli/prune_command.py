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
        UserError: ``output`` is given without ``layers``, or the folder is in use.
    """
    if output is not None and layers is None:
        raise UserError(f"dskd prune: --output {output}: say with --layers how many are written there.")
    if output is not None:
        check_export(output, overwrite)
    if sizes is None:
        sizes = study.usual_sizes() if layers is None or output is not None else []
    counts = sorted({study.total, *sizes, *([] if layers is None else [layers])}, reverse=True)
    found = [] if study.intermediate_size is None else [study.whole()]
    written = None
    for size, model in study.sizes(counts):
        found.append(size)
        print(f"{len(size.layers)} layers: perplexity {size.perplexity:,.2f}", flush=True)
        if output is not None and len(size.layers) == layers:
            model.to(study.stored_dtype)  # type: ignore[arg-type]
            written = export_student(model, study.tokenizer, output, overwrite=overwrite)
            chosen = size
    _show(found)
    if written is None:
        print(f"write one of them with --output FOLDER --layers {'N' if layers is None else layers}")
        return
    record = {
        "source": study.source,
        "data": study.data,
        "by": study.by,
        "scores": study.scores or None,
        "layers": chosen.layers,
        "intermediate_size": study.intermediate_size,
        "sizes": [asdict(size) for size in found],
    }
    write_atomic(Path(written) / "pruning.json", json.dumps(record, indent=1) + "\n")
    print(f"{len(chosen.layers)} layers written to {written}: {list(chosen.layers)}")
    print(f"next: dskd fit --config YOURS --model.student.source {written} (without student.prune)")


def _show(sizes: Sequence[PrunedSize]) -> None:
    narrowed = any(size.intermediate_size is not None for size in sizes)
    slowest = sizes[0].tokens_per_second
    rows = [
        (
            str(len(size.layers)),
            *(["all" if size.intermediate_size is None else f"{size.intermediate_size:,}"] * narrowed),
            f"{size.parameters / 1e6:,.1f}",
            f"{size.bytes / 2**20:,.0f}",
            f"{size.tokens_per_second:,.0f}",
            f"{size.tokens_per_second / slowest:.2f}",
            f"{size.perplexity:,.2f}",
        )
        for size in sizes
    ]
    units = ["feed-forward units"] * narrowed
    headings = (
        "layers", *units, "million parameters", "MiB", "tokens/s", "speed", "perplexity before training"
    )  # fmt: skip
    console = Console()
    for table in number_tables(headings, rows, console.width):
        console.print(table)
