"""Which objective suits a pair of models and data: all that fit, at one budget, with paired tests."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object, write_atomic, write_object
from dskd_lightning.launch.arguments import read_yaml
from dskd_lightning.planning.first_config import plan
from dskd_lightning.planning.pace import TOGETHER, measure_pace
from dskd_lightning.planning.schedule import Work, schedule
from dskd_lightning.runs.heartbeat import duration
from dskd_lightning.runs.lock import locked
from dskd_lightning.runs.run_folder import TEACHER
from dskd_lightning.study.failures import VariantsFailed
from dskd_lightning.study.study import Study

__all__ = ["Benchmark", "Verdict", "parse_duration", "recommended"]

logger = logging.getLogger(__name__)

SAME = {"SFT": "sft", "logit KD": "logit_kd", "DSKD": "dskd", "DSKD v2": "dskd_v2"}
"""Objectives for one vocabulary: name of the variant -> shipped config."""
CROSS = {
    "SFT": "sft",
    "shared vocabulary": "shared_vocabulary",
    "ALM": "alm",
    "DSKD token alignment": "dskd_eta",
    "DSKD cross-model attention": "dskd_cma",
}
"""Objectives across vocabularies."""

_UNTRAINED = "before training"
_TESTED = 0.1  # of the data
_PROMPTS = 200
_SEEDS = [10, 20, 30]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Verdict:
    """What a benchmark ends in.

    Args:
        objective: name of the variant to take.
        reason: one sentence.
        significant: whether its ROUGE-L differs from SFT's, adjusted for the number of methods.
    """

    objective: str
    reason: str
    significant: bool

    def __str__(self) -> str:
        return f"take {self.objective}: {self.reason}."


@dataclass(frozen=True)
class Benchmark:
    """Every objective that fits the pair, trained for the same steps on the same batches.

    Args:
        teacher: as `ModelSpec.source`.
        student: likewise.
        data: files or Hub datasets.
        output: folder of the study.
        budget: seconds for everything.
        rates: learning rates that each objective tries; the best on validation is tested.
        objectives: names among `SAME` or `CROSS`; None for all that fit.
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
        found = plan(self.teacher, self.student, self.data, str(self.output))
        write_atomic(base, found.text.replace("FILE", str(base)))
        known = SAME if found.identical else CROSS
        names = self.objectives or tuple(known)
        if unknown := [name for name in names if name not in known]:
            raise UserError(
                f"--objectives: {unknown[0]!r} doesn't fit this pair; there are {', '.join(known)}."
            )
        costliest = next((name for name in reversed(names) if name.startswith("DSKD")), names[-1])
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
        objective = f"dskd:objective/{known[costliest]}"
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
        variants: dict[str, Any] = {
            TEACHER: {"model": TEACHER},
            _UNTRAINED: {"train": False},
            **{name: {"configs": [f"dskd:objective/{known[name]}"]} for name in names},
        }
        study = {
            "base": ["base.yaml", "budget.yaml"],
            "grid": {"model.optimizer.init_args.lr": list(self.rates)},
            "variants": variants,
        }
        header = "# Written by `dskd benchmark`; `dskd study` runs it, too.\n"
        write_atomic(self.file, header + yaml.safe_dump(study, sort_keys=False))


def recommended(output: Path) -> Verdict:
    """The objective to take, from the study's table and paired tests.

    The best ROUGE-L among those significantly above SFT's; else, as responses don't tell them apart, the
    best likelihood.

    Raises:
        UserError: no trained objective was tested, or results are damaged.
    """
    summary = read_object(output / "report" / "comparison.json", "run the benchmark again")
    table = read_object(output / "table.json", "run the benchmark again")
    trained = [item for item in summary["candidates"] if item["name"] not in (TEACHER, _UNTRAINED)]
    better = [item for item in trained if item["outcome"] == "better"]
    baseline = summary["baseline"]
    if baseline in (TEACHER, _UNTRAINED):
        raise UserError(
            f"{output}: no objective's training ended with a finite loss: start over with lower --rates and "
            "`--overwrite true`."
        )
    if better:
        best = max(better, key=lambda item: item["mean"])
        gain, p = best["difference"]["mean"], best["adjusted_p_value"]
        compared = len(summary["candidates"])
        reason = f"its ROUGE-L is {gain:+.1f} from {baseline}'s (p = {p:.2g}, Holm, {compared} comparisons)"
        return Verdict(best["name"], reason, True)
    names = [baseline, *(item["name"] for item in trained)]
    best_name = min(names, key=lambda name: table[name]["perplexity_per_byte"])
    perplexity = table[best_name]["perplexity_per_byte"]
    reason = (
        f"no method's ROUGE-L is significantly above {baseline}'s here; of all it predicts the held-out "
        f"responses best (perplexity {perplexity:.3f} per byte). More prompts or a larger --budget tell more"
    )
    return Verdict(best_name, reason, False)


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
