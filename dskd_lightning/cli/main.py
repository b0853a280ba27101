"""Entry point: picks the command, and turns a user's mistake into one sentence."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence

from dskd_lightning import __version__
from dskd_lightning.errors import UserError
from dskd_lightning.launch.arguments import run_function
from dskd_lightning.runs.console import configure_output

__all__ = ["main"]

_TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

_USAGE = """usage: dskd COMMAND [options]

  fit        train a student:            dskd fit --config FILE.yaml [--config MORE.yaml] [--key value]
  validate   likelihood and closeness to the teacher on the validation set
  test       the same on the test set, and generated responses scored with ROUGE-L
  predict    generated responses only
  study      train several variants of one config and compare them
  cache      store a teacher's hidden states for many epochs
  generate   let a model answer a file of prompts
  vocab      how two tokenizers overlap, and which objective suits the pair
  judge      let a model choose between two runs' responses
  harness    evaluate an exported student with lm-evaluation-harness
  compare    statistics over two or more runs, and a report
  export     write a trained student as a plain Hugging Face folder

`dskd COMMAND --help` explains a command; `dskd fit --print_config` prints every setting.
"""


def _commands() -> dict[str, Callable[..., object]]:
    from dskd_lightning.cli import commands

    return {name: getattr(commands, name) for name in commands.__all__}


def _run(arguments: list[str]) -> int:
    command = arguments[0]
    if command in _TRAINER_COMMANDS:
        from dskd_lightning.launch.lightning_cli import DistillationCLI

        DistillationCLI(args=arguments)
        return 0
    commands = _commands()
    if command not in commands:
        raise UserError(f"There is no command {command!r}; `dskd --help` lists them.")
    result = run_function(commands[command], arguments[1:], prog=f"dskd {command}")
    return result if isinstance(result, int) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``dskd`` with ``arguments`` (default: the process's); returns the exit status.

    A `UserError` or a full disk prints one sentence and gives status 2 or 3.
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
        return _run(arguments)
    except UserError as error:
        print(f"dskd: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = f" {error.filename}" if error.filename else ""
        print(
            f"dskd: error: cannot write{where}: {error.strerror}; free space or choose another --output.",
            file=sys.stderr,
        )
        return 3


def entry_point() -> None:
    """What the console script calls."""
    sys.exit(main())
