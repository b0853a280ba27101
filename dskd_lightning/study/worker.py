"""One variant of a study, from a fresh process to its numbers on disk."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.files import write_atomic

__all__ = ["DONE", "run_variant"]

DONE = "variant.json"
"""Written last: a variant that has it is finished."""


def run_variant(arguments: list[str], folder: str, train: bool, test: bool) -> None:
    """Train and test as ``dskd fit`` and ``dskd test`` would; exits 2 on a user's mistake."""
    from dskd_lightning.cli.console import configure_output

    configure_output()
    try:
        _run(arguments, Path(folder), train, test)
    except UserError as error:
        print(f"dskd: error: {error}", file=sys.stderr)
        sys.exit(2)


def _run(arguments: list[str], folder: Path, train: bool, test: bool) -> None:
    from dskd_lightning.callbacks.monitor import peak_memory_bytes
    from dskd_lightning.cli.lightning_cli import DistillationCLI

    cli = DistillationCLI(args=arguments, run=False)
    result: dict[str, object] = {"trained": train}
    started = time.perf_counter()
    if train:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        result["validation"] = {
            name: float(value)
            for name, value in cli.trainer.callback_metrics.items()
            if name.startswith("val/")
        }
    result["training_seconds"] = time.perf_counter() - started if train else 0.0
    result["peak_memory_bytes"] = peak_memory_bytes()
    result["steps"] = cli.trainer.global_step
    if test:
        best = folder / "checkpoints" / "best.ckpt"
        cli.trainer.test(
            cli.model,
            datamodule=cli.datamodule,
            ckpt_path=str(best) if best.is_file() else None,
            verbose=False,
        )
        result["test"] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    write_atomic(folder / DONE, json.dumps(result, indent=2) + "\n")
