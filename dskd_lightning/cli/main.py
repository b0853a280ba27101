"""Entry point: picks the command, and turns a user's mistake into one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dskd_lightning import __version__
from dskd_lightning.cli.trainer_help import TRAINER_HELP
from dskd_lightning.errors import UserError
from dskd_lightning.launch.arguments import check_configs, run_function
from dskd_lightning.launch.configs import with_shipped_configs
from dskd_lightning.runs.console import configure_output
from dskd_lightning.runs.text import visible

__all__ = ["main"]

_TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

_USAGE = """usage: dskd COMMAND [options]

  quickstart train three small students on two CPU cores and compare them
  init       write a config for a teacher, a student and data
  doctor     check a config's run without training, calculate its memory, traffic, disk and time
  data       show how each model reads a config's data, before training
  config     list the configs that come with the package, or show one
  prune      how good, large and fast a model is with fewer layers; write one size
  fit        train a student:            dskd fit --config FILE.yaml [--config dskd:NAME] [--key value]
  validate   likelihood and closeness to the teacher on the validation set
  test       the same on the test set, and generated responses scored with ROUGE-L
  predict    generated responses only
  benchmark  find the objective for a pair and data within a budget of time
  study      train several variants of one config and compare them
  cache      store a teacher's hidden states for many epochs
  generate   let a model answer a file of prompts
  chat       talk to runs, their teacher or other models side by side
  vocab      how two tokenizers overlap, and which objective suits the pair
  judge      let a model choose between two runs' responses
  harness    evaluate an exported student with lm-evaluation-harness
  compare    statistics over two or more runs, and a report
  export     write a trained student as a plain Hugging Face folder

`dskd COMMAND --help` explains a command; `dskd fit --print_config` prints every setting.
"""


_ROOM = "free space or choose another --output"
_RIGHTS = "allow writing there or choose another --output"
_PLACE = "choose another --output"
_STORAGE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on file sizes (`ulimit -f`) or choose another --output",
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENAMETOOLONG: "choose a shorter --output",
    errno.ENOTDIR: "a part of that path is no folder: choose another --output",
    errno.EISDIR: "it is a folder: choose another --output",
    errno.EEXIST: "something else has that name: choose another --output",
    errno.ELOOP: _PLACE,
    errno.EIO: "check the disk or choose another --output",
    errno.ESTALE: "check the network disk or choose another --output",
}
"""What a user can do about a file that can't be used; other errors are faults of the program."""


def _commands() -> dict[str, Callable[..., object]]:
    from dskd_lightning.cli import commands

    return {name: getattr(commands, name) for name in commands.__all__}


def _run(arguments: list[str]) -> int:
    command = arguments[0]
    if command in _TRAINER_COMMANDS:
        if arguments[1:] in (["-h"], ["--help"]):  # alone: Lightning's own takes seconds and lists hundreds
            print(TRAINER_HELP.format(command=command), end="")
            return 0
        arguments = ["--help" if word == "--help-all" else word for word in arguments]
        from dskd_lightning.launch.lightning_cli import DistillationCLI

        arguments = with_shipped_configs(arguments)
        check_configs(arguments)
        DistillationCLI(args=arguments)
        return 0
    commands = _commands()
    if command not in commands:
        raise UserError(f"There is no command {command!r}; `dskd --help` lists them.")
    result = run_function(commands[command], arguments[1:], prog=f"dskd {command}")
    return result if isinstance(result, int) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``dskd`` with ``arguments`` (default: the process's); returns the exit status.

    A `UserError` prints one sentence and gives status 2, a file that can't be read or written gives 3,
    a signal that stops training 128 + its number.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    configure_output()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if arguments[0] == "--version":
        print(f"dskd {__version__}")
        return 0
    try:
        with _threads_complain():
            return _run(arguments)
    except UserError as error:
        _complain(str(error))
        return 2
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        _complain(_unusable(error))
        return 3
    except Exception as error:
        # Ranks that this process forked were stopped by a signal, after which they end with 128 + signal.
        if type(error).__name__ != "ProcessExitedException" or getattr(error, "exit_code", 0) <= 128:
            raise
        return int(error.exit_code)  # type: ignore[attr-defined]


def _unusable(error: OSError) -> str:
    where = f" {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
    return f"cannot read or write{where}: {error.strerror}; {_STORAGE[error.errno or 0]}."


@contextlib.contextmanager
def _threads_complain() -> Iterator[None]:
    """What a full disk does to a thread that writes, as TensorBoard's, is one message, too."""
    previous = threading.excepthook

    def tell(failure: Any) -> None:
        error = failure.exc_value
        if isinstance(error, OSError) and error.errno in _STORAGE:
            _complain(_unusable(error))
        else:
            previous(failure)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = previous


def _complain(message: str) -> None:
    """One message; it may quote data and models, which must not steer the terminal."""
    print(f"dskd: error: {visible(message)}", file=sys.stderr)


def entry_point() -> None:
    """What the console script calls."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `dskd config list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)
