"""A model's responses as training data: several for each prompt, resumable, filtered, with provenance."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dskd_lightning.data.chat import ChatRenderer, RenderedConversation, RenderedTurn
from dskd_lightning.data.collate import token_batch
from dskd_lightning.data.examples import Example, Message
from dskd_lightning.data.prepared import conversation_row, rendered_example
from dskd_lightning.errors import UserError
from dskd_lightning.evaluation.candidates import ResponseTurns, Turn, candidates_by_prompt
from dskd_lightning.evaluation.predict import PromptRecord, predict
from dskd_lightning.evaluation.response_parts import adopt_parts
from dskd_lightning.files import read_object, write_atomic, write_object
from dskd_lightning.functional import token_log_prob
from dskd_lightning.generation.filtering import Candidate, ResponseFilter
from dskd_lightning.generation.generator import Generator
from dskd_lightning.models.fingerprint import weights_fingerprint
from dskd_lightning.models.output import decoder_hidden, side
from dskd_lightning.ranks import barrier, gathered, rank_and_world
from dskd_lightning.runs.lock import only_one
from dskd_lightning.runs.predictions import Prediction

__all__ = ["prompt_records", "response_likelihoods", "samples_folder", "write_response_data"]

_log = logging.getLogger(__name__)
_TOGETHER = 8
_REMEDY = "delete it, which computes it anew"


def prompt_records(renderer: ChatRenderer, examples: Sequence[Example]) -> list[PromptRecord]:
    """What is to be answered, as the model of ``renderer`` reads it: behind their ``teacher_messages`` where
    examples have such; responses in them are ignored."""
    return [
        PromptRecord(
            index,
            e.place,
            renderer.generation_prompt(e.for_teacher(renderer.system).prompt, e.place, tools=e.tools),
            (),
        )
        for index, e in enumerate(examples)
    ]


def samples_folder(output: Path) -> Path:
    """Where responses lie until the file ``output`` is complete."""
    return output.with_name(f"{output.name}.samples")


def write_response_data(
    generator: Generator,
    renderer: ChatRenderer,
    examples: Sequence[Example],
    output: Path,
    seeds: Sequence[int | None],
    keep: ResponseFilter,
    provenance: dict[str, Any],
    progress: Callable[[int | None, int, int], None] | None = None,
    places: Sequence[Path] | None = None,
    model_id: str | None = None,
) -> dict[str, Any]:
    """Answer every example once per seed and write the responses that are kept, one record each.

    What was generated lies in ``OUTPUT.samples`` until the file is complete, so that an interrupted call
    goes on where it stopped, or where `answer_part` has been. ``OUTPUT.meta.json`` says where the responses
    come from. The prompts lie in memory, and of the responses those to one prompt.

    Args:
        generator: the model with its settings.
        renderer: how the model reads a conversation.
        examples: what to answer, see `prompt_records`.
        output: the JSONL file.
        seeds: one sample of each prompt per seed; None decodes greedily.
        keep: which responses are written.
        provenance: what else to say of them.
        progress: called with (seed, prompts done, prompts of this rank).
        places: folders with parts of the responses, which together must hold all; None generates what is
            missing.
        model_id: see `predict`; None for the fingerprint of the generator's weights.

    Returns:
        The content of ``OUTPUT.meta.json``.

    Raises:
        UserError: nothing is left, what lies in ``OUTPUT.samples`` was made with other settings, a part
            is missing, or another process writes the file.
    """
    with _held(output):
        records = prompt_records(renderer, examples)
        prompts = [record.ids for record in records]
        folder = samples_folder(output)
        identity = model_id or weights_fingerprint(generator.model)
        adopt_parts(generator, records, folder, places, model_id=identity, seeds=seeds)
        predictions = predict(generator, records, folder, model_id=identity, seeds=seeds, progress=progress)
        scores = {
            seed: _scored(generator, renderer, prompts, answered, folder / f"likelihoods_{seed}.json")
            for seed, answered in (predictions if keep.reads_likelihood else {}).items()
        }

        def kept(dropped: Counter[str]) -> Iterator[Candidate]:  # read anew each time, rather than held
            return keep.by_prompt(candidates_by_prompt(predictions, scores), dropped)

        found, dropped = sum(map(len, predictions.values())), Counter[str]()
        left, unfinished, answered_prompts = 0, 0, set[int]()
        for candidate in kept(dropped):
            left += 1
            unfinished += not candidate.finished
            answered_prompts.add(candidate.prompt)
        meta = {
            **provenance,
            "weights": identity,
            "generation": asdict(generator.settings),
            "seeds": list(seeds),
            "filter": asdict(keep),
            "prompts": len(examples),
            "responses": found,
            "kept": left,
            "prompts_without_response": len(examples) - len(answered_prompts),
            "unfinished": unfinished,
            "dropped": dict(dropped),
        }
        if not left:
            raise UserError(
                f"{output}: none of {found} responses is left ({_counted(dropped)}); ask for less, or for "
                "longer responses."
            )
        barrier()  # the others have read what the first deletes
        if rank_and_world()[0] == 0:
            lines = (
                _record(examples[candidate.prompt], candidate.text) + "\n" for candidate in kept(Counter())
            )
            write_atomic(output, lines)
            write_atomic(output.with_suffix(".meta.json"), json.dumps(meta, indent=2) + "\n")
            shutil.rmtree(folder)
        barrier()
        return meta


@contextlib.contextmanager
def _held(output: Path) -> Iterator[None]:
    """Keep other runs, not other ranks, from the file and its folder of samples."""
    with contextlib.ExitStack() as held:
        alone: bool | None = True
        if rank_and_world()[0] == 0:
            output.parent.mkdir(parents=True, exist_ok=True)
            path = output.with_name(f".{output.name}.lock")
            alone = held.enter_context(only_one(path, f"writes {output}", wait=False))
        if gathered(alone)[0] is None:
            raise UserError(
                f"{output}: another process writes it: wait until it has ended, or name another file."
            )
        yield


def _counted(counts: Any) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def _record(example: Example, response: str) -> str:
    record = json.loads(example.fields) if example.fields else {}
    record["messages"] = [*map(_turn, example.prompt), {"role": "assistant", "content": response}]
    if example.tools:
        record["tools"] = json.loads(example.tools)
    if example.teacher_messages:
        record["teacher_messages"] = [_turn(message) for message in example.teacher_messages]
    return json.dumps(record, ensure_ascii=False)


def _turn(message: Message) -> dict[str, Any]:
    turn = {"role": message.role, "content": message.content}
    weight = {"weight": 0} if message.role == "assistant" and not message.learnt else {}
    return {**turn, **(json.loads(message.extra) if message.extra else {}), **weight}


def _scored(
    generator: Generator,
    renderer: ChatRenderer,
    prompts: Sequence[Sequence[int]],
    answered: Sequence[Prediction],
    path: Path,
) -> list[float | None]:
    """Likelihoods of the answers, kept in ``path``; every rank computes its share of them."""
    rank, world = rank_and_world()
    mine = path.with_suffix(f".{rank}-{world}.json")
    if not mine.is_file():
        turns = ResponseTurns(renderer, prompts, answered, range(rank, len(answered), world))
        values = response_likelihoods(generator.model, generator.pad_id, turns)
        write_object(mine, {"nll": values}, indent=None)
    barrier()
    scores: list[float | None] = [None] * len(answered)
    for other in range(world):
        file = path.with_suffix(f".{other}-{world}.json")
        places = range(other, len(answered), world)
        known = read_object(file, _REMEDY).get("nll")
        if not isinstance(known, list) or len(known) != len(places) or not all(map(_is_score, known)):
            raise UserError(f"{file}: holds no {len(places)} likelihoods; {_REMEDY}.")
        for at, value in zip(places, known, strict=True):
            scores[at] = value
    return scores


def _is_score(value: object) -> bool:
    return value is None or isinstance(value, float)


@torch.no_grad()
def response_likelihoods(model: Any, pad_id: int, turns: Sequence[Turn]) -> list[float | None]:
    """Nats per token of each response by the model itself; None for one without tokens.

    Args:
        model: a causal language model.
        pad_id: its padding token.
        turns: prompt ids, and what `ChatRenderer.response_turn` gave; a few are held at a time.
    """
    device = model.get_input_embeddings().weight.device
    lengths = {at: len(prompt) for at, (prompt, (ids, _)) in enumerate(turns) if ids}
    order = sorted(lengths, key=lambda at: -lengths[at])
    found: list[float | None] = [None] * len(turns)
    for start in range(0, len(order), _TOGETHER):
        places = order[start : start + _TOGETHER]
        together = [turns[at] for at in places]
        rendered = [
            rendered_example(conversation_row(RenderedConversation((RenderedTurn(list(prompt), *turn),))))
            for prompt, turn in together
        ]
        tokens = token_batch(rendered, pad_id, device)
        read = side(model, decoder_hidden(model, tokens), tokens)
        log_p = token_log_prob(read.hidden, read.head, read.labels)
        sums = log_p.new_zeros(len(places)).index_add(0, read.sequence, log_p)
        counts = torch.bincount(read.sequence, minlength=len(places))
        for at, value in zip(places, (-sums / counts.clamp(min=1)).tolist(), strict=True):
            found[at] = value
    return found
