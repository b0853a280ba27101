"""Gives a run its teacher caches: finds them, builds what is missing, and hands out the heads."""

from __future__ import annotations

import contextlib
import io
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from transformers import PreTrainedModel

from dskd_lightning.data.prepared import PreparedDataset
from dskd_lightning.errors import UserError
from dskd_lightning.files import look_anew, write_atomic
from dskd_lightning.models.fingerprint import weights_fingerprint
from dskd_lightning.models.loading import load_teacher
from dskd_lightning.models.output import input_embeddings, language_head
from dskd_lightning.models.spec import TeacherSpec
from dskd_lightning.models.teacher_cache_settings import TeacherCacheSettings
from dskd_lightning.processor import working_device
from dskd_lightning.ranks import barrier, gathered, rank_and_world
from dskd_lightning.runs.lock import locked
from dskd_lightning.runs.parts import Part
from dskd_lightning.teacher_cache.build import StateBuilder, shard_tokens
from dskd_lightning.teacher_cache.codecs import bytes_per_token
from dskd_lightning.teacher_cache.head import TeacherHead, head_fingerprint, load_teacher_head
from dskd_lightning.teacher_cache.identity import Memory, cache_parts, response_tokens
from dskd_lightning.teacher_cache.manifest import Layout, Manifest, cache_key, differing_parts
from dskd_lightning.teacher_cache.parts import join_parts, say_done
from dskd_lightning.teacher_cache.store import TeacherStates, is_complete

if TYPE_CHECKING:
    from dskd_lightning.data.datamodule import InstructionDataModule, Stage

__all__ = ["begin_cache", "build_part", "cache_root", "ensure_caches", "join_caches"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Wanted:
    """One cache: a teacher's states of one prepared dataset."""

    teacher: int
    dataset: PreparedDataset
    parts: dict[str, str]
    root: Path
    answered: npt.NDArray[np.bool_]

    @property
    def folder(self) -> Path:
        return self.root / cache_key(self.parts)


def cache_root(datamodule: InstructionDataModule, settings: TeacherCacheSettings) -> Path:
    """The folder that holds all teacher caches."""
    if settings.folder is None:
        return datamodule.cache_dir / "teacher-states"
    return Path(settings.folder).expanduser()


def ensure_caches(
    datamodule: InstructionDataModule,
    specs: Sequence[TeacherSpec],
    stages: Sequence[Stage],
    settings: TeacherCacheSettings | None = None,
    *,
    required: bool = True,
) -> list[TeacherHead | None] | None:
    """Make the caches of ``stages`` complete and let ``datamodule`` read them.

    A teacher is loaded whole only where something is missing, and freed before the next. With
    `torch.distributed` all ranks call this together and share the shards; the folder must then be
    one that all of them see.

    Args:
        datamodule: whose ``teacher_hidden`` is set for ``stages``.
        specs: its teachers.
        stages: whose states are needed.
        settings: None takes the datamodule's.
        required: False gives None instead of building or complaining where something is missing.

    Returns:
        Each teacher's head (None for one that is known by log-probabilities alone), or None.

    Raises:
        UserError: a cache is missing and may not be built (and in what the nearest one differs), a
            shard is damaged, the head isn't the one that the cache was built with, or the disk is
            too small.
    """
    with torch.device("cpu"):  # Trainer calls this with the training device as the default
        return _ensure(datamodule, specs, stages, settings, required)


def build_part(
    datamodule: InstructionDataModule,
    specs: Sequence[TeacherSpec],
    stages: Sequence[Stage],
    settings: TeacherCacheSettings,
    part: Part,
) -> None:
    """Compute one part of each teacher's caches of ``stages``; other jobs compute the others.

    Raises:
        UserError: as `ensure_caches`, or another job computes that part in the same folder.
    """
    root = cache_root(datamodule, settings)
    memory = Memory(root / "fingerprints.json")
    for index, spec in enumerate(specs):
        caches = _each_once(_caches_of(datamodule, spec, index, stages, settings, root, memory))
        with contextlib.ExitStack() as held:
            for cache in caches if rank_and_world()[0] == 0 else ():
                _check_manifest(cache, spec)
                told = f"--part: another job computes {part} in '{cache.folder}': let it, or end it first."
                held.enter_context(locked(cache.folder / f".{part.name}.lock", told))
            # As the first rank sees it: another job may complete one between the ranks' looks.
            names = gathered([cache.folder.name for cache in caches if not is_complete(cache.folder)])[0]
            absent = [cache for cache in caches if cache.folder.name in names]
            if absent:
                _build(datamodule, spec, absent, settings, part)
            for cache in caches if rank_and_world()[0] == 0 else ():
                say_done(cache.folder, part)


def join_caches(
    datamodule: InstructionDataModule,
    specs: Sequence[TeacherSpec],
    stages: Sequence[Stage],
    settings: TeacherCacheSettings,
    places: Sequence[Path],
) -> None:
    """Complete each teacher's caches of ``stages`` from other folders; see `join_parts`."""
    root = cache_root(datamodule, settings)
    memory = Memory(root / "fingerprints.json")
    for index, spec in enumerate(specs):
        for cache in _each_once(_caches_of(datamodule, spec, index, stages, settings, root, memory)):
            _check_manifest(cache, spec)
            join_parts(cache.folder, places, cache.parts, spec.source)


def _caches_of(
    datamodule: InstructionDataModule,
    spec: TeacherSpec,
    index: int,
    stages: Sequence[Stage],
    settings: TeacherCacheSettings,
    root: Path,
    memory: Memory,
) -> dict[Stage, _Wanted]:
    """By stage; none of a teacher that is known by its log-probabilities."""
    names: Sequence[Stage] = () if spec.absent else stages
    return {stage: _wanted(datamodule, spec, index, stage, settings, root, memory) for stage in names}


def _each_once(caches: Mapping[Stage, _Wanted]) -> list[_Wanted]:
    """Stages with the same data have the same cache."""
    return list({cache.folder: cache for cache in caches.values()}.values())


def _ensure(
    datamodule: InstructionDataModule,
    specs: Sequence[TeacherSpec],
    stages: Sequence[Stage],
    settings: TeacherCacheSettings | None,
    required: bool,
) -> list[TeacherHead | None] | None:
    settings = settings or datamodule.teacher_cache or TeacherCacheSettings()
    root = cache_root(datamodule, settings)
    memory = Memory(root / "fingerprints.json")
    wanted = [
        _caches_of(datamodule, spec, index, stages, settings, root, memory)
        for index, spec in enumerate(specs)
    ]
    everything = [cache for caches in wanted for cache in caches.values()]
    for cache in everything:
        _check_manifest(cache, specs[cache.teacher])
    missing = _missing(everything, root)
    if missing and not required:
        return None
    if missing and not settings.build:
        raise UserError(_explanation(missing[0], specs[missing[0].teacher]))
    barrier()  # nobody builds before all have looked
    heads: list[TeacherHead | None] = []
    for index, spec in enumerate(specs):
        if spec.absent:  # see `ensure_log_probabilities`
            heads.append(None)
            for stage in stages:
                previous = tuple(datamodule.teacher_hidden.get(stage, ()))[:index]
                datamodule.teacher_hidden[stage] = (*previous, None)
            continue
        caches = _each_once(wanted[index])
        absent = [cache for cache in caches if cache in missing]
        if absent:
            _log.info("%s", _explanation(absent[0], spec))
            head = _build(datamodule, spec, absent, settings)
        else:
            head = load_teacher_head(spec)
        for cache in absent:
            look_anew(cache.folder)
        stores = {cache.folder: TeacherStates(cache.folder) for cache in caches}
        heads.append(_checked(head, spec, list(stores.values())))
        rank, ranks = rank_and_world()
        for store in stores.values():
            store.verify(content=settings.verify, rank=rank, ranks=ranks)
        for stage in stages:
            previous = tuple(datamodule.teacher_hidden.get(stage, ()))[:index]
            datamodule.teacher_hidden[stage] = (*previous, stores[wanted[index][stage].folder])
    return heads


def _missing(caches: Sequence[_Wanted], root: Path) -> list[_Wanted]:
    """Those that aren't complete. All ranks must see the same, or some would wait for others for ever.

    Raises:
        UserError: on every rank, where they don't.
    """
    for _ in range(2):  # another job may complete one between the ranks' looks
        missing = [cache for cache in caches if not is_complete(cache.folder)]
        names = [cache.folder.name for cache in missing]
        if all(other == names for other in gathered(names)):
            return missing
        for cache in missing:
            look_anew(cache.folder)
    raise UserError(_own_disks(root))


def _own_disks(root: Path) -> str:
    return (
        f"data.teacher_cache.folder: not every node sees the same '{root}': name a folder on a disk that "
        "they share, or run `dskd cache` on each node before."
    )


def _wanted(
    datamodule: InstructionDataModule,
    spec: TeacherSpec,
    index: int,
    stage: Stage,
    settings: TeacherCacheSettings,
    root: Path,
    memory: Memory,
) -> _Wanted:
    dataset = datamodule.all_examples(stage).dataset
    renderer = datamodule.renderers[index + 1]
    answered = dataset.answered_by(index, datamodule.teacher_names)
    parts = cache_parts(spec, renderer, dataset, index + 1, settings.dtype, memory, answered)
    return _Wanted(index, dataset, parts, root, answered)


def _check_manifest(cache: _Wanted, spec: TeacherSpec) -> None:
    """Refuse a manifest that says something else than its folder's name and the config."""
    manifest = Manifest.read(cache.folder)
    if manifest is None:
        return
    same_type = spec.dtype in ("auto", manifest.teacher_dtype) or spec.quantization is not None
    if manifest.parts != cache.parts or manifest.dtype != cache.parts["cache dtype"] or not same_type:
        raise UserError(
            f"The teacher cache's '{cache.folder / 'manifest.json'}' is damaged (it contradicts the folder's "
            f"name): delete the folder '{cache.folder}', which computes it anew."
        )


def _explanation(cache: _Wanted, spec: TeacherSpec) -> str:
    """Why there is no cache: the nearest one differs in these parts, or there is none."""
    nearest = Manifest.nearest([cache.root], cache.parts)
    if nearest is None:
        found = "there is none"
    elif nearest.parts == cache.parts:
        found = "it is incomplete"
    else:
        shown = ("source", "max_length", "max_prompt_length")
        notes = ", ".join(f"{name}: {nearest.notes.get(name)}" for name in shown)
        parts = ", ".join(differing_parts(cache.parts, nearest.parts))
        found = f"the nearest one differs in: {parts}; its {notes}"
    return (
        f"No complete teacher cache of '{spec.source}' in '{cache.root}' ({found}): `dskd cache` or "
        "`teacher_cache.build: true` computes it."
    )


def _build(
    datamodule: InstructionDataModule,
    spec: TeacherSpec,
    caches: Sequence[_Wanted],
    settings: TeacherCacheSettings,
    part: Part | None = None,
) -> TeacherHead:
    rank, ranks = rank_and_world()
    teacher = load_teacher(spec)
    fingerprints = weights_fingerprint(teacher), head_fingerprint(teacher)  # read before they are moved
    if not spec.quantization:
        teacher.to(_device(datamodule))  # type: ignore[arg-type]
    vocab = input_embeddings(teacher).shape[0]
    for cache in caches:
        builder = _builder(datamodule, spec, cache, settings, teacher, fingerprints, rank)
        builder.announce(vocab, *((0, 1) if part is None else part.rank(0, 1)))
        error = builder.build(teacher, *((rank, ranks) if part is None else part.rank(rank, ranks)))
        barrier()
        _log.info("Teacher cache of '%s' as %s: %s.", spec.source, settings.dtype, error)
    return TeacherHead.from_model(teacher).cpu()


def _device(datamodule: InstructionDataModule) -> torch.device:
    """The trainer's, or the accelerator that is here."""
    if datamodule.trainer is not None:
        return datamodule.trainer.strategy.root_device
    return working_device()


def _builder(
    datamodule: InstructionDataModule,
    spec: TeacherSpec,
    cache: _Wanted,
    settings: TeacherCacheSettings,
    teacher: PreTrainedModel,
    fingerprints: tuple[str, str],
    rank: int,
) -> StateBuilder:
    head = language_head(teacher)
    manifest = Manifest(
        parts=cache.parts,
        hidden_size=head.hidden_size,
        dtype=settings.dtype,
        teacher_dtype=str(teacher.dtype).removeprefix("torch."),
        shard_tokens=shard_tokens(bytes_per_token(head.hidden_size, settings.dtype)),
        weights=fingerprints[0],
        head=fingerprints[1],
        notes={
            "source": spec.source,
            "max_length": str(datamodule.max_length),
            "max_prompt_length": str(datamodule.max_prompt_length),
            **{name: version(name) for name in ("torch", "transformers")},
        },
    )
    tokens = response_tokens(cache.dataset, cache.teacher + 1, cache.answered)
    found = begin_cache(cache.folder, manifest, tokens)
    if found.weights != fingerprints[0]:
        raise UserError(
            f"The unfinished teacher cache '{cache.folder}' was begun with other weights of '{spec.source}': "
            "delete that folder."
        )
    renderer = datamodule.renderers[cache.teacher + 1]
    pad = renderer.tokenizer.pad_token_id
    pad_id = renderer.tokenizer.eos_token_id if pad is None else pad
    return StateBuilder(
        cache.folder, found, Layout(tokens, found.shard_tokens), cache.dataset, cache.teacher + 1, pad_id,
        settings.tokens_per_batch,
    )  # fmt: skip


def begin_cache(folder: Path, manifest: Manifest, tokens: np.ndarray) -> Manifest:
    """The manifest of a cache, which the first rank writes with its index, unless they are there.

    Args:
        folder: of the cache.
        manifest: to write.
        tokens: ``[examples]``, response tokens of each.

    Raises:
        UserError: it can't be written, or not every rank sees it.
    """
    if rank_and_world()[0] == 0:
        _write_manifest(folder, manifest, tokens)
    barrier()
    look_anew(folder.parent)
    look_anew(folder)
    found = Manifest.read(folder)
    if not all(gathered(found is not None)) or found is None:
        raise UserError(_own_disks(folder.parent))
    return found


def _write_manifest(folder: Path, manifest: Manifest, tokens: np.ndarray) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if Manifest.read(folder) is None:
            index = io.BytesIO()
            np.save(index, tokens)
            write_atomic(folder / "tokens.npy", index.getvalue())
            replace(manifest, index_crc32=zlib.crc32(index.getvalue())).write(folder)
    except OSError as error:
        raise UserError(
            f"Can't write the teacher cache '{folder}' ({error.strerror or error}): set "
            "`teacher_cache.folder`."
        ) from error


def _checked(head: TeacherHead, spec: TeacherSpec, stores: Sequence[TeacherStates]) -> TeacherHead:
    """The head, in the type and with the content that the caches were built with.

    Raises:
        UserError: even the whole teacher has another head now.
    """
    for store in stores:
        expected = store.manifest.head
        if head_fingerprint(head) != expected:  # tied otherwise, or changed by an adapter
            head = TeacherHead.from_model(load_teacher(spec))
        if head_fingerprint(head) != expected:
            raise UserError(
                f"The head of '{spec.source}' isn't the one that the teacher cache '{store.folder}' was "
                "built with: delete that folder, or restore the weights."
            )
    return head
