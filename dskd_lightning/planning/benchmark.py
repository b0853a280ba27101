"""Which objective suits a pair of models and data: several at one budget, with paired tests."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object, write_atomic, write_object
from dskd_lightning.launch.arguments import read_yaml
from dskd_lightning.planning.first_config import plan
from dskd_lightning.planning.objectives import OBJECTIVES, compared, objective_names
from dskd_lightning.planning.pace import TOGETHER, measure_pace
from dskd_lightning.planning.schedule import Work, schedule
from dskd_lightning.planning.verdict import Verdict, recommended
from dskd_lightning.runs.heartbeat import duration
from dskd_lightning.runs.lock import locked
from dskd_lightning.study.failures import VariantsFailed
from dskd_lightning.study.study import Study

__all__ = ["Benchmark", "parse_duration"]

logger = logging.getLogger(__name__)

_TESTED = 0.1  # of the data
_PROMPTS = 200
_SEEDS = [10, 20, 30]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Benchmark:
    """Objectives that fit the pair, trained for the same steps on the same batches.

    Args:
        teacher: as `ModelSpec.source`.
        student: likewise.
        data: files or Hub datasets.
        output: folder of the study.
        budget: seconds for everything.
        rates: learning rates that each objective tries; the best on validation is tested.
        objectives: names among `OBJECTIVES`; None for the usual ones and what `recommend` names for the pair.
    """

    teacher: str
    student: str
    data: str
    output: Path
    budget: float
    rates: tuple[float, ...] = (1e-4, 3e-4)
    objectives: tuple[str, ...] | None = None

    @property
    def file(self) -> Path:
        """The study, which ``dskd study`` runs, too."""
        return self.output / "benchmark.study.yaml"

    def run(self, overwrite: bool = False) -> Verdict:
        """Plan, measure a step, train, test and compare; what is finished already is kept.

        Raises:
            VariantsFailed: runs failed; the others are done, and what they tell is in the folder.
            UserError: the folder holds another benchmark, another process works in it, models or data
                can't be read, or every training diverged.
        """
        held = (
            f"--output: another benchmark works in {self.output}: wait until it has ended, or name another "
            "folder."
        )
        with locked(self.output / ".locks" / ".benchmark", held):
            return self._run(overwrite)

    def _run(self, overwrite: bool) -> Verdict:
        since = time.monotonic()
        self._claim(overwrite)
        planned = self.file.is_file()
        if not planned:
            self._plan(since)
        study = Study.read(self.file, str(self.output))
        try:
            study.run(overwrite=overwrite)
        except VariantsFailed:
            with contextlib.suppress(UserError):  # it may be that none is left
                logger.info("of the others: %s", self._recommend())
            raise
        spent = time.monotonic() - since
        if not planned and spent > self.budget:
            logger.warning(
                "It took %s, more than the budget of %s: the machine was slower than while it was measured.",
                duration(spent), duration(self.budget),
            )  # fmt: skip
        return self._recommend()

    def _recommend(self) -> Verdict:
        verdict = recommended(self.output)
        write_atomic(self.output / "recommendation.json", json.dumps(vars(verdict), indent=2) + "\n")
        return verdict

    def _claim(self, overwrite: bool) -> None:
        """Write down what the folder is of; a study of something else isn't gone on with.

        Without a study there is nothing to go on with, whatever an attempt that failed or was killed wrote
        down. One that is given up goes first: a kill mustn't leave it under a new name.
        """
        path = self.output / "benchmark.json"
        mine = {
            "teacher": self.teacher, "student": self.student, "data": self.data, "budget": self.budget,
            "rates": list(self.rates), "objectives": self.objectives and list(self.objectives),
        }  # fmt: skip
        if overwrite or not path.is_file():
            self.file.unlink(missing_ok=True)
        elif self.file.is_file():
            held = read_object(path, "start over with `--overwrite true`")
            if other := sorted(key for key in mine if held.get(key) != mine[key]):
                raise UserError(
                    f"--output: {self.output} holds a benchmark with another {other[0]} "
                    f"({held.get(other[0])}); name another folder, or start over with `--overwrite true`."
                )
        write_object(path, mine)

    def _plan(self, since: float) -> None:
        """Write config and study.

        Args:
            since: when the benchmark began, of a monotonic clock.
        """
        base = self.output / "base.yaml"
        alone = f"{self.output}_fit"  # of `dskd fit` with the config, beside the study
        found = plan(self.teacher, self.student, self.data, alone)
        write_atomic(base, found.text.replace("FILE", str(base)))
        names = objective_names(self.objectives, found.identical, found.objective)
        costliest = [name for name in OBJECTIVES if name in names][-1]
        values = read_yaml(base)
        overlay = {
            "data": {"test_split": _TESTED},
            "responses": {
                "seeds": _SEEDS,
                "max_new_tokens": values["data"]["max_length"] // 2,
                "batch_size": TOGETHER,
                "limit": _PROMPTS,
            },
            "completions": {"prompts": 0},
        }
        work = Work(
            objectives=len(names),
            rates=len(self.rates),
            prompts=min(_PROMPTS, math.ceil(_TESTED * found.examples)),
            seeds=len(_SEEDS),
            teacher=max(1.0, found.ratio),
            accumulated=values["trainer"]["accumulate_grad_batches"],
        )
        objective = f"dskd:objective/{OBJECTIVES[costliest]}"
        pace = measure_pace(base, overlay, objective, work.accumulated, self.output / "probe")
        spent = time.monotonic() - since
        given = schedule(work, pace, self.budget, spent)
        logger.info(
            "%d runs of %d steps (%.1f epochs), %.2f s a step of %s; everything is expected to end at %s, "
            "after %s of %s.",
            work.runs, given.steps, given.epochs, pace.step, costliest,
            time.strftime("%H:%M", time.localtime(time.time() + given.seconds)),
            duration(spent + given.seconds), duration(self.budget),
        )  # fmt: skip
        overlay["trainer"] = {
            "max_steps": given.steps,
            "max_epochs": -1,
            "check_val_every_n_epoch": None,
            "val_check_interval": given.interval,
        }
        write_atomic(self.output / "budget.yaml", yaml.safe_dump(overlay, sort_keys=False))
        study = {
            "base": ["base.yaml", "budget.yaml"],
            "grid": {"model.optimizer.init_args.lr": list(self.rates)},
            "variants": compared(names),
        }
        header = "# Written by `dskd benchmark`; `dskd study` runs it, too.\n"
        write_atomic(self.file, header + yaml.safe_dump(study, sort_keys=False))


def parse_duration(text: str) -> float:
    """Seconds of ``90s``, ``45m``, ``2h`` or ``1.5d``.

    Raises:
        UserError: it is none.
    """
    number, unit = text[:-1], text[-1:]
    try:
        seconds = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"--budget {text}: give a number and a unit, such as 90s, 45m, 2h or 1.5d.")
    return seconds
