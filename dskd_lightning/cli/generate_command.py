"""`dskd generate`: a model's answers to a file of prompts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.preparation import PreparationSettings
from dskd_lightning.data.reading import read_examples
from dskd_lightning.data.sources import resolve_sources
from dskd_lightning.data.urls import masked
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.predict import told_by_seed
from dskd_lightning.evaluation.response_data import prompt_records, samples_folder, write_response_data
from dskd_lightning.evaluation.response_parts import answer_part
from dskd_lightning.generation.filtering import ResponseFilter
from dskd_lightning.generation.generator import GenerationSettings, Generator
from dskd_lightning.models.fingerprint import weights_fingerprint
from dskd_lightning.models.loading import load_model, load_tokenizer
from dskd_lightning.models.spec import ModelSpec
from dskd_lightning.processor import in_a_computed_type, working_device
from dskd_lightning.ranks import rank_and_world
from dskd_lightning.runs.heartbeat import Progress
from dskd_lightning.runs.parts import Part

__all__ = ["generate_responses"]


def generate_responses(
    model: str,
    prompts: str,
    output: str,
    settings: GenerationSettings,
    seeds: list[int | None],
    keep: ResponseFilter,
    dtype: Any,
    limit: int | None,
    part: str | None = None,
    join: Sequence[str] | None = None,
) -> None:
    """Answer every prompt and write ``{"messages": [...]}`` lines and where they come from.

    Started by ``torchrun``, each process takes its share of the prompts.

    Raises:
        UserError: there are no prompts, or as `answer_part` and `write_response_data`.
    """
    chosen = None if part is None else Part.parse(part)
    if chosen is not None and join:
        raise UserError("--part: generates, where --join puts together; give one of them.")
    device = _join()
    spec = ModelSpec(source=model, dtype=dtype)
    tokenizer = load_tokenizer(spec)
    renderer = ChatRenderer.from_spec(tokenizer, spec)
    reading = PreparationSettings(limit=limit, needs_response=False)
    sources = resolve_sources(prompts)
    examples = list(read_examples(sources, reading, Counter()))
    if not examples:
        raise UserError(f"{masked(prompts)}: holds no prompts.")
    network: Any = load_model(spec)
    identity = weights_fingerprint(network)  # of another processor's part, too, whatever it computes in
    if dtype == "auto":
        in_a_computed_type(network, device)
    generator = Generator(network.to(device), tokenizer, settings)
    provenance = {
        "model": model,
        "data": [{"name": source.name, "fingerprint": source.fingerprint()} for source in sources],
        "limit": limit,
    }
    with Progress("Responses", len(examples), "prompts", seconds=10) as progress:
        report = told_by_seed(progress)
        if chosen is not None:
            folder = samples_folder(Path(output))
            records = prompt_records(renderer, examples)
            count = answer_part(
                generator, records, folder, chosen, model_id=identity, seeds=seeds, progress=report
            )
        else:
            places = [Path(place).expanduser() for place in join] if join else None
            meta = write_response_data(
                generator, renderer, examples, Path(output), seeds, keep, provenance, report, places, identity
            )
    if rank_and_world()[0] != 0:
        return
    if chosen is not None:
        print(f"{chosen}: responses to {count} prompts in {folder / chosen.name}")
    else:
        _tell(output, meta)


def _tell(output: str, meta: dict[str, Any]) -> None:
    print(f"{output}: {meta['kept']} of {meta['responses']} responses to {meta['prompts']} prompts")
    for reason, count in meta["dropped"].items():
        print(f"  dropped, {reason}: {count}")
    if meta["prompts_without_response"]:
        print(f"  prompts without any response left: {meta['prompts_without_response']}")
    if meta["unfinished"]:
        print(f"  kept though cut off by --max_new_tokens: {meta['unfinished']} (--finished true drops them)")


def _join() -> torch.device:
    """Join the processes of ``torchrun``; the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return working_device()
