"""Caches of log-probabilities: what an endpoint or a field of the records tells of a teacher."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dskd_lightning.data.prepared import PreparedDataset
from dskd_lightning.errors import UserError
from dskd_lightning.models.spec import TeacherSpec
from dskd_lightning.models.teacher_cache_settings import TeacherCacheSettings
from dskd_lightning.ranks import gathered, rank_and_world
from dskd_lightning.runs.heartbeat import Progress
from dskd_lightning.runs.lock import only_one
from dskd_lightning.structures import IGNORE_INDEX, LogProbabilities
from dskd_lightning.teacher_cache.attach import begin_cache, cache_root
from dskd_lightning.teacher_cache.endpoint import CompletionsEndpoint
from dskd_lightning.teacher_cache.identity import Memory, response_tokens
from dskd_lightning.teacher_cache.manifest import Layout, Manifest, cache_key
from dskd_lightning.teacher_cache.shards import shard_name, write_shard
from dskd_lightning.teacher_cache.store import ShardStore, read_layout
from dskd_lightning.teacher_cache.told import (
    Vocabulary,
    WrongVocabulary,
    entries_of,
    log_probabilities,
    nothing_known,
)
from dskd_lightning.tokenizers import tokenizer_fingerprint

if TYPE_CHECKING:
    from dskd_lightning.data.datamodule import InstructionDataModule, Stage

__all__ = ["Estimate", "TeacherLogProbabilities", "ensure_log_probabilities"]

_log = logging.getLogger(__name__)
_VERSION = "1"
_SHARD_TOKENS = 2048  # what a killed collection may have to ask for again
_FIELD_ENTRIES = 64  # of a position, besides the observed one

Ask = Callable[[int], LogProbabilities]


class TeacherLogProbabilities(ShardStore[LogProbabilities]):
    """A teacher's log-probabilities at response positions, memory-mapped; a `TeacherHidden`."""

    main = "ids"

    def read(self, shard: dict[str, Tensor], rows: slice) -> LogProbabilities:
        """What is known of ``rows``."""
        return LogProbabilities(shard["ids"][rows].long(), shard["log_probs"][rows])


class Estimate:
    """What the missing part of a cache asks for.

    Args:
        requests: number of responses.
        tokens: of prompts and responses together, as an endpoint bills them.
        price: of a million tokens, or None.
    """

    def __init__(self, requests: int, tokens: int, price: float | None) -> None:
        self.requests, self.tokens, self.price = requests, tokens, price

    def __str__(self) -> str:
        cost = "" if self.price is None else f", about {self.tokens * self.price / 1e6:,.2f} at your price"
        return f"{self.requests:,} requests with {self.tokens:,} tokens{cost}"


def ensure_log_probabilities(
    datamodule: InstructionDataModule,
    specs: Sequence[TeacherSpec],
    stage: Stage = "train",
    *,
    estimate_only: bool = False,
) -> list[Estimate]:
    """Collect what is missing of the teachers that are known by log-probabilities, one shard after another.

    Args:
        datamodule: whose ``teacher_hidden`` of ``stage`` is set.
        specs: its teachers; others are passed over.
        stage: whose responses are asked about.
        estimate_only: ask for nothing.

    Returns:
        What is (or would have been) asked of each endpoint.

    Raises:
        UserError: an endpoint or a field doesn't give what is needed (said on every rank); finished
            shards are kept.
    """
    with torch.device("cpu"):  # Trainer calls this with the training device as the default
        return _ensure(datamodule, specs, stage, estimate_only)


def _ensure(
    datamodule: InstructionDataModule, specs: Sequence[TeacherSpec], stage: Stage, estimate_only: bool
) -> list[Estimate]:
    estimates = []
    for index, spec in enumerate(specs):
        if not spec.absent:
            continue
        view = datamodule.all_examples(stage)
        dataset = view.dataset
        answered = dataset.answered_by(index, datamodule.teacher_names)
        rows_asked = view.indices[answered[view.indices]]
        wanted = frozenset(rows_asked.tolist())
        folder, layout, key = _begun(datamodule, spec, index + 1, dataset, rows_asked, answered)
        missing = layout.missing(folder)
        rows = [row for shard in missing for row in layout.examples(shard) if row in wanted]
        if spec.endpoint is not None:
            tokens = sum(int(dataset.lengths[row, index + 1]) + 1 for row in rows)
            estimate = Estimate(len(rows), tokens, spec.endpoint.price_per_million)
            estimates.append(estimate)
            _log.info("%s: %s.", spec.endpoint.base_url, estimate)
            most = spec.endpoint.most_tokens
            if most is not None and tokens > most and not estimate_only:
                raise UserError(
                    f"model.teacher.endpoint: {estimate}, more than `most_tokens: {most}`: raise it, or set "
                    "`data.limit`."
                )
        if estimate_only:
            continue
        failure: str | None = None
        if missing and rank_and_world()[0] == 0:
            try:
                with only_one(folder / ".collecting.lock", "asks for the same log-probabilities"):
                    ask, parallel = _source(datamodule, spec, index + 1, dataset, wanted, layout)
                    _collect(folder, layout, key, layout.missing(folder), ask, parallel)
            except UserError as error:
                failure = str(error)
        if (failure := gathered(failure)[0]) is not None:  # the others would wait for ever
            raise UserError(failure)
        store = TeacherLogProbabilities(folder)
        store.verify()
        found = list(datamodule.teacher_hidden.get(stage, ())) or [None] * len(specs)
        found[index] = store
        datamodule.teacher_hidden[stage] = found
    return estimates


def _begun(
    datamodule: InstructionDataModule,
    spec: TeacherSpec,
    model: int,
    dataset: PreparedDataset,
    rows: npt.NDArray[np.intp],
    answered: npt.NDArray[np.bool_],
) -> tuple[Path, Layout, str]:
    """The cache's folder with its manifest and index, its layout and its key."""
    root = cache_root(datamodule, datamodule.teacher_cache or TeacherCacheSettings())
    memory = Memory(root / "fingerprints.json")
    tokenizer = datamodule.renderers[model].tokenizer
    endpoint = spec.endpoint
    parts = {
        "kind": "log-probabilities",
        "data or truncation": memory.data(dataset, model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "split": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(),
        "cache version": _VERSION,
    }
    if endpoint is not None:
        parts |= {"endpoint": endpoint.base_url, "model": endpoint.model or spec.source}
        parts |= {"api": endpoint.api, "top_k": str(endpoint.top_k)}
    else:
        assert spec.log_probabilities is not None
        parts |= {"field": spec.log_probabilities, "records": _digest(dataset, rows, spec.log_probabilities)}
    k = _FIELD_ENTRIES if endpoint is None else endpoint.top_k
    tokens = response_tokens(dataset, model, answered)
    manifest = Manifest(
        parts=parts, hidden_size=1 + k, dtype="float32", teacher_dtype="float32", shard_tokens=_SHARD_TOKENS,
        weights="unknown", head="unknown",
        notes={"source": spec.source, "torch": version("torch"), "transformers": version("transformers")},
    )  # fmt: skip
    folder = root / cache_key(parts)
    found = begin_cache(folder, manifest, tokens)
    return folder, read_layout(folder, found), found.key


def _digest(dataset: PreparedDataset, rows: npt.NDArray[np.intp], field: str) -> str:
    digest = hashlib.sha256()
    for row in rows.tolist():
        digest.update(json.dumps(_field(dataset, row, field)).encode())
    return digest.hexdigest()


def _field(dataset: PreparedDataset, row: int, field: str) -> object:
    fields = dataset.example(row).fields
    value = json.loads(fields).get(field) if fields else None
    if value is None:
        raise UserError(
            f"model.teacher.log_probabilities: the record at {dataset.example(row).place} has no field "
            f"'{field}': name the field that holds them."
        )
    return value


def _source(
    datamodule: InstructionDataModule,
    spec: TeacherSpec,
    model: int,
    dataset: PreparedDataset,
    wanted: frozenset[int],
    layout: Layout,
) -> tuple[Ask, int]:
    """What tells an example's log-probabilities, and how many examples at once.

    Examples of other stages aren't asked about: nothing is known of them.
    """
    tokenizer = datamodule.renderers[model].tokenizer

    def tokens_of(row: int) -> tuple[list[int], list[int]]:
        rendered = dataset.rendered(row, model)
        last = int(rendered.labels[-1])
        assert last != IGNORE_INDEX  # a response ends every example
        return [*rendered.input_ids.tolist(), last], (rendered.response + 1).tolist()

    if spec.endpoint is not None:
        settings = spec.endpoint
        endpoint = CompletionsEndpoint(settings, settings.model or spec.source, tokenizer)

        def ask(row: int) -> LogProbabilities:
            if row in wanted:
                return endpoint.ask(*tokens_of(row))
            return nothing_known(layout.count(row), settings.top_k)

        return ask, settings.parallel
    vocabulary, field = Vocabulary(tokenizer), spec.log_probabilities or ""

    def read(row: int) -> LogProbabilities:
        if row not in wanted:
            return nothing_known(layout.count(row), _FIELD_ENTRIES)
        tokens, positions = tokens_of(row)
        labels = [tokens[position] for position in positions]
        try:
            values = _positions(_field(dataset, row, field))
            if len(values) < len(labels) - 1:  # the end of the turn may lack
                raise WrongVocabulary(f"{len(values)} positions where the response has {len(labels)} tokens")
            return log_probabilities([entries_of(v) for v in values], labels, vocabulary, _FIELD_ENTRIES)
        except (WrongVocabulary, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"model.teacher.log_probabilities: '{field}' of the record at {dataset.example(row).place} "
                f"isn't what model.teacher.source's tokenizer would have ({error}): name the model that "
                "wrote them, with its own template."
            ) from error

    return read, 1


def _positions(value: object) -> list[object]:
    """One item per response token, of OpenAI's two forms or a plain list."""
    if isinstance(value, dict) and "content" in value:
        value = value["content"]
    if isinstance(value, dict):
        tops = value.get("top_logprobs") or [{}] * len(value["tokens"])
        return [
            {
                "token": token,
                "logprob": number,
                "top_logprobs": [{"token": t, "logprob": x} for t, x in (top or {}).items()],
            }
            for token, number, top in zip(value["tokens"], value["token_logprobs"], tops, strict=True)
        ]
    if not isinstance(value, list):
        raise ValueError(f"{type(value).__name__} is no list")
    return value


def _collect(folder: Path, layout: Layout, key: str, missing: Sequence[int], ask: Ask, parallel: int) -> None:
    """Fill the missing shards; each is written as soon as it is whole."""
    total = sum(map(layout.tokens, missing))
    with (
        Progress("Teacher's log-probabilities", total, "response tokens") as progress,
        ThreadPoolExecutor(parallel) as pool,
    ):
        for shard in missing:
            found = []
            for told in _in_order(pool, ask, layout.examples(shard)):
                found.append(told)
                progress.done += len(told)
            tensors = {
                "ids": torch.cat([told.ids for told in found]),
                "log_probs": torch.cat([told.values for told in found]),
            }
            write_shard(folder / shard_name(shard), tensors, key)
        progress.say()


def _in_order(pool: ThreadPoolExecutor, ask: Ask, rows: range) -> Iterator[LogProbabilities]:
    """Answers in the order of ``rows``; the first failure ends what hasn't begun."""
    futures = [pool.submit(ask, row) for row in rows]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
