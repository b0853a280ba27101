"""One variant of a study, from a fresh process to its numbers on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dskd_lightning.errors import UserError
from dskd_lightning.files import write_atomic

__all__ = ["DONE", "run_variant"]

DONE = "variant.json"
"""Written after training, and again with the test's numbers after it."""


def run_variant(arguments: list[str], folder: str, train: bool, test: bool) -> None:
    """Train and test as ``dskd fit`` and ``dskd test`` would; exits 2 on a user's mistake.

    What ``variant.json`` in the folder says to be trained already is only tested.
    """
    from dskd_lightning.runs.console import configure_output

    configure_output()
    try:
        _run(arguments, Path(folder), train, test)
    except UserError as error:
        print(f"dskd: error: {error}", file=sys.stderr)
        sys.exit(2)


def _run(arguments: list[str], folder: Path, train: bool, test: bool) -> None:
    from dskd_lightning.launch.lightning_cli import DistillationCLI

    done = folder / DONE
    result: dict[str, Any] = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    # A new student ends what the folder held, unless it was trained here.
    cli = DistillationCLI(args=[*arguments, f"--overwrite={str(not result).lower()}"], run=False)
    if not result:
        result = {"trained": train}
        if train:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
            result["validation"] = {
                name: float(value)
                for name, value in cli.trainer.callback_metrics.items()
                if name.startswith("val/")
            }
            result["training"] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    if test:
        best = folder / "checkpoints" / "best.ckpt"
        cli.trainer.test(
            cli.model,
            datamodule=cli.datamodule,
            ckpt_path=str(best) if best.is_file() else None,
            verbose=False,
        )
        result["test"] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    write_atomic(done, json.dumps(result, indent=2) + "\n")
