"""How often a model gives the same answer to the same question in other words."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dskd_lightning.comparison.against_teacher import CLOSE
from dskd_lightning.comparison.columns import known_columns
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.metrics import exact_match
from dskd_lightning.evaluation.rouge import rouge_l
from dskd_lightning.runs.predictions import Prediction
from dskd_lightning.runs.run_folder import RunFolder

__all__ = ["FIELD", "Contradiction", "SelfConsistency", "self_consistency", "self_consistency_columns"]

FIELD = "same_as"
"""Field of a record: those that hold the same value there ask the same thing."""

_LARGEST_GROUP = 50
_COLUMNS = (
    ("questions", 1, "questions"),
    ("ROUGE-L between wordings", 1, "consistency"),
    (f"above {CLOSE:.0f}, %", 1, "close"),
    ("same words, %", 1, "exact"),
    ("ROUGE-L between seeds", 1, "between_seeds"),
)


@dataclass(frozen=True)
class Contradiction:
    """Two wordings of one question, the answers to them under the first seed, and the mean ROUGE-L between
    answers over all seeds, in percent."""

    first: Prediction
    second: Prediction
    consistency: float


@dataclass(frozen=True)
class SelfConsistency:
    """Answers of one run to different wordings of the same questions, under the same seed.

    Args:
        run: name of the run.
        questions: that were asked in several wordings; each counts once in the shares.
        consistency: mean ROUGE-L, in percent, between the answers to two wordings.
        close: percent of pairs of answers whose ROUGE-L is at least `CLOSE`.
        exact: percent of pairs of answers that are the same, word for word.
        between_seeds: mean ROUGE-L, in percent, between answers to the *same* wording under two seeds: what
            sampling alone leaves; None with one seed.
        worst: the most different pairs, worst first.
    """

    run: str
    questions: int
    consistency: float
    close: float
    exact: float
    between_seeds: float | None
    worst: tuple[Contradiction, ...]


def self_consistency(runs: Sequence[RunFolder], examples: int = 20) -> list[SelfConsistency]:
    """Each run that was asked something in several wordings; nothing where none was.

    Args:
        runs: with predictions, whose records say by `FIELD` what is asked in other words.
        examples: most pairs in `SelfConsistency.worst`.

    Raises:
        UserError: far too many records hold one value.
    """
    found = [_of_run(run, examples) for run in runs]
    return [item for item in found if item is not None]


def self_consistency_columns(
    items: Sequence[SelfConsistency],
) -> tuple[list[str], list[list[float | None]]]:
    """Headings and one row of numbers per run, without what is known of none."""
    return known_columns(_COLUMNS, items)


def _of_run(run: RunFolder, examples: int) -> SelfConsistency | None:
    first = next(iter(run.predictions.values()), [])
    groups = _groups(first, run)
    if not groups:
        return None
    answers = [{p.index: p.response for p in predictions} for predictions in run.predictions.values()]
    by_question: list[tuple[float, float, float]] = []
    contradictions = []
    for group in groups:
        scores, close, exact = [], [], []
        for one, other in itertools.combinations(group, 2):
            pairs = [(a[one.index], a[other.index]) for a in answers]
            between = [100 * rouge_l(a, [b]) for a, b in pairs]
            contradictions.append(Contradiction(one, other, statistics.fmean(between)))
            scores += between
            close += [100.0 * (score >= CLOSE) for score in between]
            exact += [100.0 * exact_match(a, [b]) for a, b in pairs]
        by_question.append((statistics.fmean(scores), statistics.fmean(close), statistics.fmean(exact)))
    consistency, close_share, exact_share = map(statistics.fmean, zip(*by_question, strict=True))
    contradictions.sort(key=lambda c: (c.consistency, c.first.index, c.second.index))
    return SelfConsistency(
        run.name, len(groups), consistency, close_share, exact_share, _between_seeds(groups, answers),
        tuple(contradictions[:examples]),
    )  # fmt: skip


def _groups(predictions: Sequence[Prediction], run: RunFolder) -> list[list[Prediction]]:
    found: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        if (name := prediction.fields.get(FIELD)) is not None:
            found[str(name)].append(prediction)
    for name, group in found.items():
        if len(group) > _LARGEST_GROUP:
            raise UserError(
                f"{run.path}: {len(group)} prompts hold '{FIELD}': {name!r}, more than {_LARGEST_GROUP}: it "
                "names prompts that ask the same in other words, not prompts of one kind."
            )
    return [group for group in found.values() if len(group) > 1]


def _between_seeds(groups: Sequence[Sequence[Prediction]], answers: Sequence[dict[int, str]]) -> float | None:
    def means() -> Iterator[float]:
        for group in groups:
            yield statistics.fmean(
                100 * rouge_l(one[p.index], [other[p.index]])
                for p in group
                for one, other in itertools.combinations(answers, 2)
            )

    return statistics.fmean(means()) if len(answers) > 1 else None
