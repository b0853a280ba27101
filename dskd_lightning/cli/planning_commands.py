"""`dskd init`, `dskd doctor`, `dskd benchmark` and `dskd quickstart`."""

from __future__ import annotations

import sys
from pathlib import Path

from dskd_lightning.errors import UserError
from dskd_lightning.files import write_atomic
from dskd_lightning.planning import examine, plan
from dskd_lightning.planning.benchmark import Benchmark, parse_duration
from dskd_lightning.planning.target import Target
from dskd_lightning.planning.verdict import recommended
from dskd_lightning.runs.heartbeat import duration
from dskd_lightning.runs.text import visible
from dskd_lightning.study.quickstart import quickstart_study

__all__ = ["run_benchmark", "run_doctor", "run_init", "run_quickstart"]


def run_doctor(config: list[str], target: Target | None = None) -> int:
    """Print findings as they are made; 1 where one keeps the run from starting."""
    failed = False
    for finding in examine(config, target):
        failed = failed or finding.state == "failed"
        print(f"{finding.state:<7} {finding.what:<11} {visible(finding.text)}", flush=True)
    return int(failed)


def run_init(
    file: str,
    teacher: str | None,
    student: str | None,
    data: str | None,
    output: str | None,
    yes: bool,
    overwrite: bool,
) -> None:
    """Ask for what isn't given, and write the config.

    Raises:
        UserError: something isn't given and can't be asked for, or the file is there already.
    """
    if Path(file).exists() and not overwrite:
        raise UserError(f"{file}: is there already; name another file or give --overwrite true.")
    asked = {
        "teacher": (teacher, "Teacher (Hub id, folder, GGUF file, or demo)"),
        "student": (student, "Student (likewise)"),
        "data": (data, "Training data (file, folder, Hub dataset, or demo)"),
    }
    answers = {name: given or _ask(name, question, yes) for name, (given, question) in asked.items()}
    folder = output or f"runs/{Path(file).stem}"
    found = plan(answers["teacher"], answers["student"], answers["data"], folder)
    write_atomic(file, found.text.replace("FILE", file))
    needed, free = found.estimate.bytes / 2**30, found.machine.memory / 2**30
    print(f"{file} written: about {needed:.1f} GiB of {free:.1f} free, {duration(found.seconds)}")
    if not found.fits:
        print("That is more memory than there is: take a smaller pair or another machine.")
    print(f"next: dskd doctor {file}, then dskd fit --config {file}")


def run_benchmark(
    teacher: str | None,
    student: str | None,
    data: str | None,
    budget: str,
    output: str,
    rates: list[float],
    objectives: list[str] | None,
    overwrite: bool,
) -> None:
    """Run the benchmark and print its recommendation.

    Raises:
        UserError: something isn't given, or the benchmark can't be run.
    """
    for name, given in (("teacher", teacher), ("student", student), ("data", data)):
        if not given:
            raise UserError(f"--{name}: give one.")
    if not rates or not all(rate > 0 for rate in rates):
        raise UserError(f"--rates {rates}: give learning rates above 0.")
    benchmark = Benchmark(
        str(teacher),
        str(student),
        str(data),
        Path(output),
        parse_duration(budget),
        tuple(rates),
        None if objectives is None else tuple(objectives),
    )
    verdict = benchmark.run(overwrite)
    print(visible(str(verdict)))


def run_quickstart(output: str | None, overwrite: bool, cross: bool) -> None:
    """Run the quickstart's study, which ends as a benchmark does.

    Raises:
        UserError: a variant failed.
    """
    study = quickstart_study(output, cross)
    study.run(overwrite=overwrite)
    print(visible(str(recommended(study.output))))


def _ask(name: str, question: str, yes: bool) -> str:
    if yes or not sys.stdin.isatty():
        raise UserError(f"--{name}: give one; nothing can be asked here.")
    while not (answer := input(f"{question}: ").strip()):
        pass
    return answer
