"""One variant of a study, from a fresh process to its numbers on disk."""

from __future__ import annotations

import math
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dskd_lightning.checkpoints import restored
from dskd_lightning.errors import Diverged, UserError
from dskd_lightning.files import read_if_there, read_object, write_object
from dskd_lightning.runs.identity import MODEL_KEY
from dskd_lightning.runs.lock import lock_run
from dskd_lightning.runs.parent import end_with_parent
from dskd_lightning.runs.run_folder import RunFolder
from dskd_lightning.runs.text import visible
from dskd_lightning.study.log import kept

if TYPE_CHECKING:
    from lightning import Trainer

    from dskd_lightning.launch.lightning_cli import DistillationCLI
    from dskd_lightning.runs.lock import HeldLocks

__all__ = ["DONE", "read_result", "run_variant"]

DONE = "variant.json"
"""Written after training, and again with the test's numbers after it."""
BEGUN = "begun.json"
"""Written before training: of which settings the folder's checkpoints are."""
_VALIDATION = "val/"
_LIKELIHOODS = ("val/nll_per_token", "val/nll_per_byte")
_LARGEST = 1e308
_REMEDY = "delete the folder '{}' to run it again"


def read_result(folder: Path) -> dict[str, Any] | None:
    """What ``variant.json`` of a run folder says, or None where there is none.

    ``diverged`` is there, with what the run said then, where its loss became no number.

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

    Training that was interrupted goes on from its last checkpoint, if that is of the same settings. What
    ``variant.json`` in the folder says to be trained already is only tested. What goes to the standard error
    is kept in the folder, see `log`.

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
    with kept(Path(folder)):
        try:
            _run(arguments, Path(folder), settings, train, test)
        except UserError as error:
            _say(error)
            sys.exit(2)
        except SystemExit as stop:  # after SIGTERM Lightning ends training with the status of success
            sys.exit(stop.code or 128 + signal.SIGTERM)
        except Exception:  # multiprocessing would tell it after the log is closed
            traceback.print_exc()
            sys.exit(1)


def _say(error: UserError) -> None:
    print(f"dskd: error: {visible(str(error))}", file=sys.stderr)


def _run(arguments: list[str], folder: Path, settings: str, train: bool, test: bool) -> None:
    from dskd_lightning.launch.lightning_cli import DistillationCLI
    from dskd_lightning.launch.run_files import trained_checkpoint

    lock_run(folder)
    result = read_result(folder) or {}
    cli: DistillationCLI | None = None
    if not result:
        result = {"settings": settings, "trained": train}
        if train:
            try:
                cli, measured = _trained(arguments, folder, settings)
                result.update(measured)
            except Diverged as error:
                _say(error)
                result["diverged"] = str(error)
    if test and "diverged" not in result:
        if cli is None:
            cli = DistillationCLI(args=arguments, run=False)
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


def _trained(arguments: list[str], folder: Path, settings: str) -> tuple[DistillationCLI, dict[str, Any]]:
    """As ``dskd fit`` trains, from its last checkpoint where the folder has one of the same settings.

    Returns:
        What trained, and the last validation and what training has cost.

    Raises:
        Diverged: a loss, or the validation's, is no number.
    """
    from dskd_lightning.launch.lightning_cli import DistillationCLI
    from dskd_lightning.launch.run_files import clear_run

    last = folder / "checkpoints" / "last.ckpt"
    begun = read_if_there(folder / BEGUN, _REMEDY.format(folder)) or {}
    resumes = begun.get("settings") == settings and restored(last).exists()
    if not resumes:
        clear_run(folder)  # first: what lies beside the digest is of these settings
        write_object(folder / BEGUN, {"settings": settings})
    cli = DistillationCLI(args=["fit", *arguments, *(["--ckpt_path=last"] if resumes else [])])
    _stop_if_told(cli.trainer)
    validation = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    validation = {name: value for name, value in validation.items() if name.startswith(_VALIDATION)}
    if resumes and not validation:  # it was killed after the last one
        curves = RunFolder.read(folder).curves
        validation = {name: curves[name][-1][1] for name in curves if name.startswith(_VALIDATION)}
    if not all(math.isfinite(validation.get(name, 0.0)) for name in _LIKELIHOODS):
        raise Diverged("The likelihood in validation is no number after training; lower the learning rate.")
    cost = read_object(folder / "training.json", _REMEDY.format(folder))
    return cli, {"validation": validation, "training": cost}


def _stop_if_told(trainer: Trainer) -> None:
    """After SIGTERM a test goes on to its end, and a strategy may end training without an exception."""
    if trainer.received_sigterm or trainer.interrupted:
        sys.exit(128 + signal.SIGTERM)
