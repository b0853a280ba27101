"""One number per prompt, averaged over a run's seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.metrics import exact_match
from dskd_lightning.evaluation.rouge import rouge_l
from dskd_lightning.runs.heartbeat import Progress
from dskd_lightning.runs.predictions import Prediction
from dskd_lightning.runs.run_folder import Draw, RunFolder

__all__ = ["PROMPT_METRICS", "PromptMetric", "RunScores", "prompt_metric", "score_run"]


@dataclass(frozen=True)
class PromptMetric:
    """A metric with a value for every prediction.

    Args:
        name: as on the command line.
        label: as in tables.
        score: the value of one prediction.
        higher_is_better: False for metrics where less is better.
    """

    name: str
    label: str
    score: Callable[[Prediction], float]
    higher_is_better: bool = True


PROMPT_METRICS = (
    PromptMetric("rougeL", "ROUGE-L", lambda p: 100 * rouge_l(p.response, p.references)),
    PromptMetric("exact_match", "Exact match", lambda p: 100 * exact_match(p.response, p.references)),
    PromptMetric("length", "Response tokens", lambda p: float(p.tokens)),
    PromptMetric("finished", "Finished %", lambda p: 100.0 * p.finished),
)


@dataclass(frozen=True)
class RunScores:
    """A metric of one run.

    Args:
        by_prompt: index -> mean over seeds.
        by_seed: sampling -> mean over prompts.
    """

    by_prompt: dict[int, float]
    by_seed: dict[Draw, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed.values())

    @property
    def seed_deviation(self) -> float | None:
        """Standard deviation over seeds of the run's mean; None with one seed."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


def prompt_metric(name: str) -> PromptMetric:
    """The metric of that name.

    Raises:
        UserError: there is none.
    """
    for metric in PROMPT_METRICS:
        if metric.name.lower() == name.lower():
            return metric
    names = ", ".join(metric.name for metric in PROMPT_METRICS)
    raise UserError(f"unknown metric {name!r}: choose one of {names}.")


def score_run(run: RunFolder, metric: PromptMetric) -> RunScores:
    """Score all predictions of a run, once: tables, tests and gates share the result.

    Raises:
        UserError: the run has no predictions, or its seeds answer different prompts.
    """
    if metric.name not in run.scores:
        run.scores[metric.name] = _scored(run, metric)
    return run.scores[metric.name]


def _scored(run: RunFolder, metric: PromptMetric) -> RunScores:
    run.check_predicted()
    count = sum(map(len, run.predictions.values()))
    with Progress(f"{metric.name} of {run.name}", count, "responses", seconds=5) as progress:
        return _score_seeds(run, metric, progress)


def _score_seeds(run: RunFolder, metric: PromptMetric, progress: Progress) -> RunScores:
    totals: dict[int, float] = {}
    by_seed: dict[Draw, float] = {}
    for seed, predictions in run.predictions.items():
        scores: dict[int, float] = {}
        for prediction in predictions:
            scores[prediction.index] = metric.score(prediction)
            progress.done += 1
        if totals and scores.keys() != totals.keys():
            raise UserError(
                f"{run.path}: its seeds answer different prompts ({len(scores)} with seed {seed}, "
                f"{len(totals)} before); run `dskd predict` again to complete them."
            )
        by_seed[seed] = statistics.fmean(scores.values())
        totals = {index: totals.get(index, 0.0) + score for index, score in scores.items()}
    return RunScores({index: total / len(by_seed) for index, total in totals.items()}, by_seed)
