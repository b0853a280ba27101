"""Responses that several jobs generate, each for a part of the prompts, put together afterwards."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.predict import SETTINGS_FILE, PromptRecord, check_settings, predict
from dskd_lightning.evaluation.writer import PredictionWriter
from dskd_lightning.generation.generator import Generator
from dskd_lightning.ranks import barrier, rank_and_world
from dskd_lightning.runs.lock import locked
from dskd_lightning.runs.parts import Part, missing_parts
from dskd_lightning.runs.predictions import prediction_file
from dskd_lightning.runs.stored_predictions import StoredPredictions

__all__ = ["adopt_parts", "answer_part"]

_log = logging.getLogger(__name__)
_TOGETHER = 64  # responses in memory, which reach the disk at once


def answer_part(
    generator: Generator,
    records: Sequence[PromptRecord],
    folder: Path,
    part: Part,
    *,
    model_id: str,
    seeds: Sequence[int | None],
    progress: Callable[[int | None, int, int], None] | None = None,
) -> int:
    """Generate one part's responses into a folder of its own in ``folder``; see `predict`.

    Returns:
        Number of its prompts.

    Raises:
        UserError: there are more parts than prompts, or another job is at this part.
    """
    mine = part.take(records)
    if not mine:
        raise UserError(f"--part: {part} is empty, since there are {len(records)} prompts: take fewer parts.")
    with _held(folder, part):
        predict(generator, mine, folder / part.name, model_id=model_id, seeds=seeds, progress=progress)
    return len(mine)


def adopt_parts(
    generator: Generator,
    records: Sequence[PromptRecord],
    folder: Path,
    places: Sequence[Path] | None,
    *,
    model_id: str,
    seeds: Sequence[int | None],
) -> None:
    """Write to ``folder`` what parts in it and in ``places`` have answered, for `predict` to go on from.

    Args:
        generator: the model with its settings.
        records: all prompts.
        folder: where the responses are put together.
        places: other folders with parts; None lets prompts that no part has answered be.
        model_id: names the weights.
        seeds: as the parts had them.

    Raises:
        UserError: a part was generated with other settings, is still being generated, or, with
            ``places``, is missing.
    """
    if rank_and_world()[0] == 0:
        found = _parts(folder)
        for place in places or ():
            there = _parts(place)
            if not there:
                raise UserError(f"--join: '{place}' holds no parts of responses (part-00001-of-00016).")
            found |= there
        if wanted := bool(found) or places is not None:
            check_settings(generator, records, folder / SETTINGS_FILE, model_id)
        with contextlib.ExitStack() as held:
            for path, part in found.items():
                held.enter_context(_held(path.parent, part))
                check_settings(generator, part.take(records), path / SETTINGS_FILE, model_id)
            for seed in seeds if wanted else ():
                _adopt(found, records, folder / prediction_file(seed), seed, required=places is not None)
    barrier()


def _adopt(
    found: Mapping[Path, Part],
    records: Sequence[PromptRecord],
    target: Path,
    seed: int | None,
    required: bool,
) -> None:
    if target.exists():
        return
    answered: list[StoredPredictions] = []
    complete: dict[Part, list[Path]] = {}
    for folder, part in found.items():
        path = folder / target.name
        if path.is_file():
            indices = [record.index for record in part.take(records)]
            answered.append(StoredPredictions(path, indices))
            complete.setdefault(part, []).append(folder.parent)
    with PredictionWriter(target) as writer:
        known = {index for stored in answered for index in stored.indices.tolist()} | writer.done.keys()
        missing = sum(record.index not in known for record in records)
        if missing and required:
            which = missing_parts(complete) or f"{missing} of {len(records)} prompts"
            told = "greedy responses" if seed is None else f"responses of seed {seed}"
            raise UserError(
                f"--join: {which} of the {told} in none of the folders: generate them with --part, or leave "
                "--join out, which generates what is missing here."
            )
        before = len(writer.done)
        for stored in answered:
            new = (prediction for prediction in stored if prediction.index not in writer.done)
            while some := list(itertools.islice(new, _TOGETHER)):
                writer.append(some)
        if new_ones := len(writer.done) - before:
            _log.info("%s: %d responses of %s%s.", target, new_ones, _parts_of(complete), _twice(complete))


def _parts_of(complete: Mapping[Part, Sequence[Path]]) -> str:
    return f"{len(complete)} {'part' if len(complete) == 1 else 'parts'}"


def _twice(complete: Mapping[Part, Sequence[Path]]) -> str:
    """Which parts lie in several folders, as the end of a sentence; empty where none does."""
    quoted = {
        part: [f"'{place}'" for place in places] for part, places in complete.items() if len(places) > 1
    }
    return "".join(
        f"; {part} is in {' and '.join(places)}, of which the first is taken"
        for part, places in quoted.items()
    )


def _parts(folder: Path) -> dict[Path, Part]:
    """The folders of parts in ``folder``."""
    named = {path: Part.from_name(path.name) for path in sorted(folder.glob("part-*-of-*"))}
    return {path: part for path, part in named.items() if part and (path / SETTINGS_FILE).is_file()}


@contextlib.contextmanager
def _held(folder: Path, part: Part) -> Iterator[None]:
    """Keep a part to this job; the other processes of its ``torchrun`` come with the first."""
    if rank_and_world()[0] != 0:
        yield
        return
    told = f"{folder}: another job is at {part}: let it end, or end it first."
    with locked(folder / f".{part.name}.lock", told):
        yield
