"""One variant of a study, from a fresh process to its numbers on disk."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object, write_object
from dskd_lightning.runs.identity import MODEL_KEY
from dskd_lightning.runs.lock import lock_run
from dskd_lightning.runs.parent import end_with_parent
from dskd_lightning.runs.text import visible

if TYPE_CHECKING:
    from lightning import Trainer

    from dskd_lightning.runs.lock import HeldLocks

__all__ = ["DONE", "read_result", "run_variant"]

DONE = "variant.json"
"""Written after training, and again with the test's numbers after it."""
_LARGEST = 1e308
_REMEDY = "delete the folder '{}' to run it again"


def read_result(folder: Path) -> dict[str, Any] | None:
    """What ``variant.json`` of a run folder says, or None where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / DONE
    if not path.is_file():
        return None
    result = read_object(path, _REMEDY.format(folder))
    parts = [result.get(key) or {} for key in ("validation", "test", "training")]
    if not all(isinstance(part, dict) and all(map(_is_number, _numbers(part))) for part in parts):
        raise UserError(f"{path}: holds no numbers; {_REMEDY.format(folder)}.")
    return result


def _numbers(part: dict[str, Any]) -> list[object]:
    """All values but what says which model they are of."""
    return [value for key, value in part.items() if key != MODEL_KEY]


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGEST)


def run_variant(
    arguments: list[str],
    folder: str,
    settings: str,
    train: bool,
    test: bool,
    locks: HeldLocks | None = None,
) -> None:
    """Train and test as ``dskd fit`` and ``dskd test`` would.

    What ``variant.json`` in the folder says to be trained already is only tested.

    Args:
        arguments: the command line, without a command.
        folder: of the run.
        settings: digest of all settings, kept with the result.
        train: False evaluates the student as it is before training.
        test: False stops after training.
        locks: the study's, which this process holds too: where the study is killed, no other runs the
            variant before this one has ended, as it then does.

    Raises:
        SystemExit: 2 on a user's mistake, 143 after SIGTERM.
    """
    from dskd_lightning.runs.console import configure_output

    configure_output()
    end_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        _run(arguments, Path(folder), settings, train, test)
    except UserError as error:
        print(f"dskd: error: {visible(str(error))}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:  # after SIGTERM Lightning ends training with the status of success
        sys.exit(stop.code or 128 + signal.SIGTERM)


def _run(arguments: list[str], folder: Path, settings: str, train: bool, test: bool) -> None:
    from dskd_lightning.launch.lightning_cli import DistillationCLI
    from dskd_lightning.launch.run_files import trained_checkpoint

    lock_run(folder)
    result = read_result(folder) or {}
    # A new student ends what the folder held, unless it was trained here.
    cli = DistillationCLI(args=[*arguments, f"--overwrite={str(not result).lower()}"], run=False)
    if not result:
        result = {"settings": settings, "trained": train}
        if train:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
            _stop_if_told(cli.trainer)
            result["validation"] = {
                name: float(value)
                for name, value in cli.trainer.callback_metrics.items()
                if name.startswith("val/")
            }
            result["training"] = read_object(folder / "training.json", _REMEDY.format(folder))
    if test:
        best = trained_checkpoint(folder / "checkpoints") if result["trained"] else None
        cli.trainer.test(
            cli.model,
            datamodule=cli.datamodule,
            ckpt_path=None if best is None else str(best),
            verbose=False,
        )
        metrics = read_object(folder / "metrics.json", _REMEDY.format(folder))
        result["test"] = {name: value for name, value in metrics.items() if _is_number(value)}
        _stop_if_told(cli.trainer)
    write_object(folder / DONE, result)


def _stop_if_told(trainer: Trainer) -> None:
    """After SIGTERM a test goes on to its end, and a strategy may end training without an exception."""
    if trainer.received_sigterm or trainer.interrupted:
        sys.exit(128 + signal.SIGTERM)
