"""Prompts with every run's response side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dskd_lightning.comparison.compare import Comparison
from dskd_lightning.comparison.report.diff import Segment, shared_share, word_diff
from dskd_lightning.runs.predictions import Prediction
from dskd_lightning.runs.run_folder import RunFolder
from dskd_lightning.runs.text import shorten

__all__ = ["Answer", "Example", "collect_examples"]

_LONGEST = 6000
_REWRITTEN = 0.3


@dataclass(frozen=True)
class Answer:
    """One run's response to one prompt.

    Args:
        run: name of the run.
        score: its score, averaged over seeds.
        difference: from the baseline's score; None for the baseline itself.
        segments: the shown response, as changes from the baseline's.
        note: what the reader should know of it, or an empty text.
    """

    run: str
    score: float
    difference: float | None
    segments: tuple[Segment, ...]
    note: str


@dataclass(frozen=True)
class Example:
    """A prompt with its references and the runs' answers; ``change`` sorts examples, worst first."""

    index: int
    prompt: str
    references: tuple[str, ...]
    answers: tuple[Answer, ...]
    change: float


def collect_examples(
    comparisons: Sequence[Comparison], runs: Sequence[RunFolder], limit: int
) -> tuple[list[Example], int]:
    """Up to ``limit`` examples, the worst regressions and the largest gains; and how many there are in all.

    Responses shown are those of the first seed, and training run.
    """
    higher = comparisons[0].metric.higher_is_better
    changes: dict[int, list[float]] = {}
    for comparison in comparisons:
        for change in comparison.changes:
            changes.setdefault(change.index, []).append(change.difference if higher else -change.difference)
    worst = {index: min(values) if min(values) < 0 else max(values) for index, values in changes.items()}
    order = sorted(worst, key=lambda index: (worst[index], index))
    chosen = order if len(order) <= limit else order[: limit - limit // 3] + order[len(order) - limit // 3 :]
    seed = next(iter(runs[0].trainings()[0]))
    by_run = [{p.index: p for p in run.trainings()[0][seed]} for run in runs]
    scores = [comparisons[0].baseline_scores, *(comparison.candidate_scores for comparison in comparisons)]
    examples = []
    for index in chosen:
        predictions = [predictions[index] for predictions in by_run]
        values = [score.by_prompt[index] for score in scores]
        answers = tuple(
            _answer(
                run.name, prediction, predictions[0], value, None if run is runs[0] else value - values[0]
            )
            for run, prediction, value in zip(runs, predictions, values, strict=True)
        )
        first = predictions[0]
        examples.append(
            Example(
                index,
                shorten(first.prompt, _LONGEST),
                tuple(shorten(text, _LONGEST) for text in first.references),
                answers,
                worst[index],
            )
        )
    return examples, len(order)


def _answer(
    run: str, own: Prediction, baseline: Prediction, score: float, difference: float | None
) -> Answer:
    text, before = shorten(own.response, _LONGEST), shorten(baseline.response, _LONGEST)
    notes = [] if own.finished else ["cut off at the length limit"]
    if not text.strip():
        notes.append("empty")
    if difference is None:
        segments = [Segment("equal", text)]
    elif text == before:
        segments, notes = [Segment("equal", text)], [*notes, "same as the baseline"]
    elif not text.strip() or not before.strip():
        segments = [Segment("equal", text)]
    elif shared_share(before, text) < _REWRITTEN:
        segments, notes = (
            [Segment("equal", text)],
            [*notes, "rewritten: too few words in common to mark changes"],
        )
    else:
        segments = word_diff(before, text)
    return Answer(run, score, difference, tuple(segments), "; ".join(notes))
