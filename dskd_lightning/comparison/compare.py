"""Is one run better than another on the same prompts?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dskd_lightning.comparison.bootstrap import PairedTest, holm, paired_test
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.scores import PromptMetric, RunScores, score_run
from dskd_lightning.runs.predictions import Prediction
from dskd_lightning.runs.run_folder import RunFolder

__all__ = ["Comparison", "PromptChange", "compare", "compare_all"]

_TIE = 1e-9
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class PromptChange:
    """Scores of one prompt under the two runs, averaged over seeds."""

    index: int
    baseline: float
    candidate: float

    @property
    def difference(self) -> float:
        return self.candidate - self.baseline


@dataclass(frozen=True)
class Comparison:
    """One candidate against the baseline.

    Args:
        baseline: name of the baseline run.
        candidate: name of the candidate run.
        metric: what was scored.
        baseline_scores: the baseline's scores.
        candidate_scores: the candidate's.
        test: mean difference, interval and p-value; prompts are the pairs.
        adjusted_p_value: Holm's, over the candidates of one report.
        changes: every prompt, largest loss first.
    """

    baseline: str
    candidate: str
    metric: PromptMetric
    baseline_scores: RunScores
    candidate_scores: RunScores
    test: PairedTest
    adjusted_p_value: float
    changes: tuple[PromptChange, ...]

    @property
    def wins(self) -> int:
        """Prompts on which the candidate is better."""
        return sum(self._gain(change) > _TIE for change in self.changes)

    @property
    def losses(self) -> int:
        """Prompts on which the candidate is worse."""
        return sum(self._gain(change) < -_TIE for change in self.changes)

    @property
    def ties(self) -> int:
        """Prompts without a difference."""
        return len(self.changes) - self.wins - self.losses

    @property
    def regressions(self) -> tuple[PromptChange, ...]:
        """Prompts on which the candidate is worse, worst first."""
        return tuple(change for change in self.changes if self._gain(change) < -_TIE)

    @property
    def outcome(self) -> str:
        """``better``, ``worse`` or ``undecided``, at an adjusted p-value of 0.05."""
        if self.adjusted_p_value >= SIGNIFICANCE or self.test.mean == 0:
            return "undecided"
        return "better" if (self.test.mean > 0) == self.metric.higher_is_better else "worse"

    def _gain(self, change: PromptChange) -> float:
        return change.difference if self.metric.higher_is_better else -change.difference


def compare(
    baseline: RunFolder,
    candidate: RunFolder,
    metric: PromptMetric,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two runs over the same prompts and seeds.

    Raises:
        UserError: a run lacks predictions, or prompts, references or seeds differ.
    """
    before, after = score_run(baseline, metric), score_run(candidate, metric)
    _check_comparable(baseline, candidate)
    changes = [
        PromptChange(index, before.by_prompt[index], after.by_prompt[index]) for index in before.by_prompt
    ]
    changes.sort(key=lambda change: change.difference, reverse=not metric.higher_is_better)
    differences = [after.by_prompt[index] - before.by_prompt[index] for index in sorted(before.by_prompt)]
    test = paired_test(differences, resamples=resamples, confidence=confidence, seed=seed)
    return Comparison(
        baseline.name, candidate.name, metric, before, after, test, test.p_value, tuple(changes)
    )


def compare_all(
    runs: Sequence[RunFolder],
    metric: PromptMetric,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Comparison]:
    """Compare every further run with the first, p-values adjusted for their number.

    Raises:
        UserError: fewer than two runs, two of one name, or runs that cannot be compared.
    """
    if len(runs) < 2:
        raise UserError("a comparison needs at least two runs: the baseline first, then the others.")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"runs need different names, got {', '.join(names)}; give them as NAME=FOLDER.")
    baseline, *candidates = runs
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    comparisons = [compare(baseline, candidate, metric, **options) for candidate in candidates]  # type: ignore[arg-type]
    adjusted = holm([comparison.test.p_value for comparison in comparisons])
    return [replace(c, adjusted_p_value=p) for c, p in zip(comparisons, adjusted, strict=True)]


def _check_comparable(baseline: RunFolder, candidate: RunFolder) -> None:
    where = f"{baseline.path} and {candidate.path}"
    first, *others = (*baseline.trainings(), *candidate.trainings())
    for other in others:
        _check_same_prompts(first, other, where)


def _check_same_prompts(
    baseline: Mapping[int | None, Sequence[Prediction]],
    candidate: Mapping[int | None, Sequence[Prediction]],
    where: str,
) -> None:
    if baseline.keys() != candidate.keys():
        seeds = [", ".join(sorted(map(str, run))) for run in (baseline, candidate)]
        raise UserError(
            f"{where}: were generated with different seeds ({seeds[0]} against {seeds[1]}); "
            "generate both with the same --seeds."
        )
    for seed, first in baseline.items():
        second = candidate[seed]
        ours, theirs = {p.index: p for p in first}, {p.index: p for p in second}
        only = sorted(ours.keys() ^ theirs.keys())
        if only:
            raise UserError(
                f"{where}: answer different prompts: {len(only)} are in one of them only, first index "
                f"{only[0]}; generate both from the same file."
            )
        for index, prediction in ours.items():
            _check_same_prompt(prediction, theirs[index], where)


def _check_same_prompt(first: Prediction, second: Prediction, where: str) -> None:
    for name in ("prompt", "references"):
        if getattr(first, name) != getattr(second, name):
            raise UserError(
                f"{where}: differ in the {name} with index {first.index}; generate both from the same file "
                "and split."
            )
