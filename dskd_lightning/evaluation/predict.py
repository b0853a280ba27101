"""Predictions of a run: every prompt under every seed, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.announcement import announce
from dskd_lightning.evaluation.writer import PredictionWriter
from dskd_lightning.files import look_anew, read_object, write_object
from dskd_lightning.generation.generator import Generator
from dskd_lightning.ranks import barrier, rank_and_world
from dskd_lightning.runs.heartbeat import Progress
from dskd_lightning.runs.predictions import Prediction, prediction_file
from dskd_lightning.runs.stored_predictions import StoredPredictions

__all__ = ["PAPER_SEEDS", "SETTINGS_FILE", "PromptRecord", "check_settings", "predict", "told_by_seed"]

SETTINGS_FILE = "settings.json"

PAPER_SEEDS = (10, 20, 30, 40, 50)
"""Sampling seeds of the papers' protocol."""


@dataclass(frozen=True)
class PromptRecord:
    """What is generated for: position in the dataset, prompt text, its token ids, references, and what
    else its record says. All prompts of a stage lie in memory, unlike their responses."""

    index: int
    prompt: str
    ids: Sequence[int]
    references: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


def predict(
    generator: Generator,
    records: Sequence[PromptRecord],
    folder: str | os.PathLike[str],
    *,
    model_id: str,
    seeds: Sequence[int | None] = PAPER_SEEDS,
    progress: Callable[[int | None, int, int], None] | None = None,
) -> dict[int | None, StoredPredictions]:
    """Generate what is not on disk yet, into ``FOLDER/seed_10.jsonl`` and so on.

    Under `torch.distributed` every rank takes its share of the prompts and all return everything. What is
    returned reads the files: beside the prompts, one batch of responses is in memory.

    Args:
        generator: the model with its settings.
        records: the prompts, with unique indices.
        folder: where the files go.
        model_id: names the weights; a partial file of another model is refused.
        seeds: sampling seeds; None among them decodes greedily.
        progress: called with (seed, prompts done, prompts of this rank that aren't on disk), with 0 done at
            first, see `told_by_seed`.

    Raises:
        UserError: partial results of other settings are in the way, or indices repeat.
    """
    rank, world = rank_and_world()
    settings_file = Path(folder) / SETTINGS_FILE
    settings = check_settings(generator, records, settings_file, model_id)
    barrier()
    if rank == 0:
        write_object(settings_file, settings)
        announce([record.ids for record in records], Path(folder), seeds, generator.settings)
    barrier()  # nobody writes while answers are counted
    indices = [record.index for record in records]
    results: dict[int | None, StoredPredictions] = {}
    for seed in seeds:
        path = Path(folder) / prediction_file(seed)
        stored: StoredPredictions | None = None
        if not path.exists():
            with PredictionWriter(path, rank=rank) as writer:
                barrier()
                todo = [record for record in records if record.index not in writer.done]
                _generate(generator, todo[rank::world], seed, writer, progress)
            barrier()
            if rank == 0:
                stored = writer.finish(indices)
        barrier()
        look_anew(path.parent)
        results[seed] = StoredPredictions(path, indices) if stored is None else stored
    return results


def told_by_seed(progress: Progress) -> Callable[[int | None, int, int], None]:
    """What `predict` calls, told as ``progress``, which begins anew with each seed.

    The first batch of a seed is told at once: its speed is the first estimate of the time left.
    """

    def report(seed: int | None, done: int, total: int) -> None:
        if done == 0:
            progress.begin("Greedy responses" if seed is None else f"Responses of seed {seed}", total)
        first = progress.done == 0 < done
        progress.done = done
        if first or done == total > 0:
            progress.say()

    return report


def check_settings(
    generator: Generator, records: Sequence[PromptRecord], path: Path, model_id: str
) -> dict[str, Any]:
    """What predictions depend on, compared with what lies at ``path`` where there is something.

    Raises:
        UserError: that was made with other settings.
    """
    lengths = {
        key: value for key, value in asdict(generator.settings).items() if not key.startswith("batch_")
    }
    settings = {"model": model_id, "prompts": _digest(records), **lengths}
    if path.exists():
        previous = read_object(path, f"delete the folder '{path.parent}' to generate its predictions again")
        changed = sorted(key for key in {*settings, *previous} if settings.get(key) != previous.get(key))
        if changed:
            raise UserError(
                f"{path.parent}: holds predictions made with other settings ({', '.join(changed)} changed); "
                "choose another folder, or delete this one to start over."
            )
    return settings


def _digest(records: Iterable[PromptRecord]) -> str:
    """Of the records as a JSON list of lists, without all of it in memory."""
    digest, between = hashlib.sha256(b"["), b""
    for record in records:
        digest.update(between + json.dumps([record.index, list(record.ids), *record.references]).encode())
        between = b", "
    digest.update(b"]")
    return digest.hexdigest()


def _generate(
    generator: Generator,
    records: Sequence[PromptRecord],
    seed: int | None,
    writer: PredictionWriter,
    progress: Callable[[int | None, int, int], None] | None,
) -> None:
    by_index = {record.index: record for record in records}
    done = 0
    if progress is not None:
        progress(seed, done, len(records))
    for batch in generator(
        [record.ids for record in records], seed=seed, indices=[record.index for record in records]
    ):
        writer.append(
            [
                Prediction(
                    index=generation.index,
                    prompt=by_index[generation.index].prompt,
                    references=by_index[generation.index].references,
                    response=generation.text,
                    seed=seed,
                    tokens=generation.tokens,
                    finished=generation.finished,
                    fields=by_index[generation.index].fields,
                )
                for generation in batch
            ]
        )
        done += len(batch)
        if progress is not None:
            progress(seed, done, len(records))
