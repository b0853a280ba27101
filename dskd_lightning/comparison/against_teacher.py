"""What is left of the teacher in a student, and at what cost: the original against the distilled model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dskd_lightning.comparison.columns import known_columns
from dskd_lightning.comparison.trainings import named_folders
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.choices import choices_of, chosen
from dskd_lightning.evaluation.metrics import exact_match
from dskd_lightning.evaluation.rouge import rouge_l
from dskd_lightning.evaluation.scores import prompt_metric, score_run
from dskd_lightning.runs.predictions import Prediction
from dskd_lightning.runs.run_folder import TEACHER, RunFolder

__all__ = [
    "CLOSE",
    "AgainstTeacher",
    "Disagreement",
    "against_teacher",
    "resolve_teacher",
    "teacher_columns",
]

CLOSE = 50.0
"""ROUGE-L in percent from which two responses count as the same answer."""

_COSTS = {
    "parameters": "parameters",
    "speed": "decode_tokens_per_second",
    "memory": "peak_bytes",
    "energy": "joules_per_token",
}
_COLUMNS = (
    ("ROUGE-L, % of teacher's", 100, "quality"),
    ("parameters, %", 100, "parameters"),
    ("tokens/s, %", 100, "speed"),
    ("memory, %", 100, "memory"),
    ("energy, %", 100, "energy"),
    ("ROUGE-L between responses", 1, "consistency"),
    (f"above {CLOSE:.0f}, %", 1, "close"),
    ("same words, %", 1, "exact"),
    ("same choice, %", 1, "same_choice"),
    ("choices of the teacher's", 1, "choices"),
)


@dataclass(frozen=True)
class Disagreement:
    """A prompt, the answers of a run and of its teacher under the first seed of both, and the mean ROUGE-L
    between answers over all seeds, in percent."""

    index: int
    prompt: str
    response: str
    teachers: str
    consistency: float


@dataclass(frozen=True)
class AgainstTeacher:
    """One run beside its teacher. Shares are of the teacher's own number, None where it isn't known.

    Args:
        run: name of the run.
        quality: ROUGE-L over the teacher's.
        parameters: number of parameters over the teacher's.
        speed: decoded tokens per second over the teacher's.
        memory: peak memory while generating over the teacher's.
        energy: joules per token over the teacher's.
        exact: percent of responses that are the teacher's, word for word.
        consistency: mean ROUGE-L, in percent, of the run's responses against the teacher's.
        close: percent of responses whose ROUGE-L against the teacher's is at least `CLOSE`.
        choices: responses of the teacher's that name one of the choices which their record holds; None
            where no record does.
        same_choice: percent of these to which the run's response names the same choice.
        furthest: the prompts with the least consistent responses, worst first.
    """

    run: str
    quality: float | None
    parameters: float | None
    speed: float | None
    memory: float | None
    energy: float | None
    exact: float
    consistency: float
    close: float
    choices: int | None
    same_choice: float | None
    furthest: tuple[Disagreement, ...]


def against_teacher(runs: Sequence[RunFolder], examples: int = 20) -> list[AgainstTeacher]:
    """Each run beside the one called `TEACHER`; nothing where none is.

    Responses of one prompt and seed are compared with each other. Prompts and seeds that only one of the
    two runs has are left out.

    Args:
        runs: with predictions.
        examples: most prompts in `AgainstTeacher.furthest`.

    Raises:
        UserError: a run shares no prompt and seed with the teacher.
    """
    teacher = next((run for run in runs if run.name == TEACHER), None)
    if teacher is None:
        return []
    return [_beside(run, teacher, examples) for run in runs if run is not teacher]


def teacher_columns(items: Sequence[AgainstTeacher]) -> tuple[list[str], list[list[float | None]]]:
    """Headings and one row of numbers per run, without what is known of none."""
    return known_columns(_COLUMNS, items)


def _beside(run: RunFolder, teacher: RunFolder, examples: int) -> AgainstTeacher:
    answers = {seed: {p.index: p.response for p in found} for seed, found in teacher.trainings()[0].items()}
    pairs = [
        (p, answers[seed][p.index])
        for own in run.trainings()
        for seed in own
        for p in own[seed]
        if p.index in answers.get(seed, {})
    ]
    if not pairs:
        raise UserError(
            f"{run.path} and {teacher.path} have no prompt and seed in common: test both with the same "
            "config (`dskd test --config CONFIG --model teacher`)."
        )
    by_prompt: dict[int, list[float]] = {}
    first: dict[int, tuple[Prediction, str]] = {}
    for p, theirs in pairs:
        by_prompt.setdefault(p.index, []).append(100 * rouge_l(p.response, [theirs]))
        first.setdefault(p.index, (p, theirs))
    scores = [score for found in by_prompt.values() for score in found]
    means = {index: statistics.fmean(found) for index, found in by_prompt.items()}
    metric = prompt_metric("rougeL")
    own, whole = (score_run(folder, metric).mean for folder in (run, teacher))
    choices, same_choice = _same_choice(pairs)
    furthest = sorted(means, key=lambda index: (means[index], index))[:examples]
    return AgainstTeacher(
        run=run.name,
        quality=own / whole if whole else None,
        **{name: _share(run, teacher, key) for name, key in _COSTS.items()},
        exact=100 * statistics.fmean(exact_match(p.response, [theirs]) for p, theirs in pairs),
        consistency=statistics.fmean(scores),
        close=100 * statistics.fmean(score >= CLOSE for score in scores),
        choices=choices,
        same_choice=same_choice,
        furthest=tuple(
            Disagreement(p.index, p.prompt, p.response, theirs, means[p.index])
            for p, theirs in map(first.__getitem__, furthest)
        ),
    )


def _same_choice(pairs: Sequence[tuple[Prediction, str]]) -> tuple[int | None, float | None]:
    """How many of the teacher's responses choose, and the percent to which the run's choose the same."""
    asked = [(choices, p.response, theirs) for p, theirs in pairs if (choices := choices_of(p.fields))]
    if not asked:
        return None, None
    both = [(chosen(theirs, choices), chosen(own, choices)) for choices, own, theirs in asked]
    same = [own == wanted for wanted, own in both if wanted is not None]
    return len(same), 100 * statistics.fmean(same) if same else None


def _share(run: RunFolder, teacher: RunFolder, key: str) -> float | None:
    own, whole = ((folder.efficiency or {}).get(key) for folder in (run, teacher))
    return float(own) / float(whole) if own is not None and whole else None


def resolve_teacher(runs: Sequence[str]) -> list[str]:
    """The runs with `TEACHER` replaced by the folder of the others' teacher, under that name.

    Raises:
        UserError: the teacher wasn't tested.
    """
    if TEACHER not in runs or (Path(TEACHER) / "predictions").is_dir():
        return list(runs)
    others = [folder for run in runs if run != TEACHER for folder in named_folders(run)[1]]
    found = next((folder for run in others if (folder := Path(run) / TEACHER).is_dir()), None)
    if found is None:
        first = others[0] if others else "RUN"
        raise UserError(
            f"teacher: its responses aren't there; `dskd test --config {first}/config.yaml --model teacher` "
            f"writes them to {first}/{TEACHER}."
        )
    return [f"{TEACHER}={found}" if run == TEACHER else run for run in runs]
