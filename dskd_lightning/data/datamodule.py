"""Instruction data for one student and any number of teachers."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.trainer.states import TrainerFn

from dskd_lightning.cache_dir import cache_dir as default_folder
from dskd_lightning.cores import usable_cores
from dskd_lightning.data.batching import BatchPlan, BatchSettings
from dskd_lightning.data.chat import ChatRenderer, Learn
from dskd_lightning.data.checks import check_disk_limit, check_epoch, check_lengths
from dskd_lightning.data.collate import Collator, TeacherHidden, token_batch
from dskd_lightning.data.examples import Example
from dskd_lightning.data.formats import Format
from dskd_lightning.data.loader import DistillationLoader
from dskd_lightning.data.mixing import Mixture, mix
from dskd_lightning.data.preparation import PreparationSettings, prepare
from dskd_lightning.data.prepared import PreparedDataset, conversation_row, rendered_example
from dskd_lightning.data.preview import DataPreview
from dskd_lightning.data.rolling import RollingLoader
from dskd_lightning.data.rolling_files import RollingFiles
from dskd_lightning.data.sources import Source, Sources, resolve_sources
from dskd_lightning.data.splits import split_indices
from dskd_lightning.data.templates import split_reasoning
from dskd_lightning.data.truncation import cut_left, truncate
from dskd_lightning.data.urls import masked
from dskd_lightning.data.views import ExampleView
from dskd_lightning.errors import UserError
from dskd_lightning.models.spec import ModelSpec, Student, Teacher, teacher_names
from dskd_lightning.models.teacher_cache_settings import TeacherCacheSettings
from dskd_lightning.models.tokenizer import load_tokenizer, pad_token_id
from dskd_lightning.structures import TokenBatch

__all__ = ["InstructionDataModule", "Stage"]

Stage = Literal["train", "val", "test", "predict"]
_STAGES_OF: dict[str, tuple[Stage, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
_TOGETHER = 8  # calibration examples of a batch
_HUB_SPLIT: dict[Stage, str] = {"train": "train", "val": "validation", "test": "test", "predict": "test"}


class InstructionDataModule(pl.LightningDataModule):
    """Instruction files as batches that hold the same responses for student and teachers.

    Args:
        train: files, folders, URLs of them or Hub datasets (``owner/name[@config][:split]``), one or a
            list; in a program also a ``datasets.Dataset`` or a list of records, such as
            ``{"messages": [...]}``.
        val: likewise, to validate on.
        test: likewise, to test on.
        predict: likewise, to answer; responses may be missing.
        student: the student, for its tokenizer and template.
        teacher: the teacher or teachers; None trains without.
        format: of the records; ``auto`` looks at the first one of each file.
        system: system message for examples that have none.
        val_split: without ``val``, the share (below 1) or number of training examples to hold out.
        test_split: likewise for ``test``.
        limit: most examples to read for each stage.
        skip_invalid: leave out and count invalid records instead of stopping at the first.
        special_tokens_in_text: read special tokens' strings inside messages as those tokens; they
            are plain text unless you say so.
        learn: which texts of a conversation are learnt: those of every ``assistant`` turn, of the
            ``last`` one, or of every message (``everything``); always without those of weight 0.
        max_length: most tokens of prompt and response; a longer response is cut.
        max_prompt_length: most tokens of the prompt; a longer one loses its beginning.
        batch_size: rows per batch and process.
        eval_batch_size: likewise outside training; None for ``batch_size``.
        max_tokens_per_batch: build batches of similar lengths up to this many tokens, padding
            included, instead of ``batch_size`` rows.
        group_by_length: put examples of similar lengths in a batch of ``batch_size`` rows, and such batches
            in a step of several ranks; with a token budget or packing they are alike anyway.
        packing: put several training examples in one row of up to ``max_length`` tokens.
        pad_to_multiple_of: round row lengths up to a multiple of this.
        num_workers: processes that build batches ahead.
        pin_memory: page-locked batches, which move to the device while it computes; None where CUDA is.
        seed: of splits and of the order.
        cache_dir: where prepared tokens are kept; None for ``data`` in `dskd_lightning.cache_dir`.
        teacher_cache: keep the teachers' hidden states on the disk, computed before the first
            epoch; None runs the teachers in every step.
        max_teacher_prompt_length: most tokens of a teacher's prompt, whose sequences may be longer by as
            much; None for ``max_prompt_length``. For records with ``teacher_messages`` or a teacher's
            ``system``.
        weights: how often an epoch reads the examples of an entry of ``train``, 1 where none is given:
            with 2 each is read twice, with 0.5 half of them, another half in the next epoch.
        num_proc: processes that prepare the data, once; None for as many as the cores that this one may
            use. The prepared data are the same for any number.
        streaming: read Hub datasets part by part while they are prepared, without keeping their files on
            the disk; URLs are always read so.
        disk_limit_gb: GiB that prepared training data may take; None prepares all of them before training.
            With it files are prepared while training reads those before, and go when they were read, in
            another order each time; none may take more than a quarter. An epoch of the Trainer is as
            long as its ``limit_train_batches`` says, and the next one goes on behind it. What needs all
            data together (held-out shares, ``limit``, ``weights``, a teacher cache) isn't possible.
    """

    def __init__(
        self,
        train: Sources | None = None,
        val: Sources | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        student: Student | None = None,
        teacher: Teacher | list[Teacher] | None = None,
        format: Format = "auto",
        system: str | None = None,
        val_split: float | int = 0,
        test_split: float | int = 0,
        limit: int | None = None,
        skip_invalid: bool = False,
        special_tokens_in_text: bool = False,
        learn: Learn = "assistant",
        max_length: int = 512,
        max_prompt_length: int = 256,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        packing: bool = False,
        pad_to_multiple_of: int = 1,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int = 42,
        cache_dir: str | None = None,
        teacher_cache: TeacherCacheSettings | None = None,
        weights: dict[str, float] | None = None,
        max_teacher_prompt_length: int | None = None,
        num_proc: int | None = None,
        group_by_length: bool = False,
        streaming: bool = False,
        disk_limit_gb: float | None = None,
    ) -> None:
        super().__init__()
        self.teacher_room = 0
        if max_teacher_prompt_length is not None:
            self.teacher_room = max_teacher_prompt_length - max_prompt_length
        check_lengths(max_length, max_prompt_length, max_tokens_per_batch, self.teacher_room)
        for name, value in {
            "batch_size": batch_size, "eval_batch_size": eval_batch_size, "limit": limit,
            "pad_to_multiple_of": pad_to_multiple_of, "num_proc": num_proc,
        }.items():  # fmt: skip
            if value is not None and value < 1:
                raise UserError(f"`{name}: {value}` must be at least 1.")
        given: dict[Stage, Sources | None] = {"train": train, "val": val, "test": test, "predict": predict}
        self.sources = {stage: None if _nothing(entries) else entries for stage, entries in given.items()}
        self.student = student
        self.teachers = teacher if isinstance(teacher, list) else [] if teacher is None else [teacher]
        self.teacher_names = teacher_names(self.teachers)
        """By which records choose one of the teachers."""
        self.format: Format = format
        self.system, self.limit, self.skip_invalid = system, limit, skip_invalid
        self.special_tokens_in_text, self.learn = special_tokens_in_text, learn
        self.splits: dict[str, float | int] = {
            "val": val_split if self.sources["val"] is None else 0,
            "test": test_split if self.sources["test"] is None else 0,
        }  # fmt: skip
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.max_tokens_per_batch, self.packing = max_tokens_per_batch, packing
        if group_by_length and (packing or max_tokens_per_batch is not None):
            raise UserError(
                "data.group_by_length: a token budget and packing choose lengths by themselves; leave it out."
            )
        self.group_by_length = group_by_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self.num_proc, self.streaming = num_proc, streaming
        self.cache_dir = default_folder("data") if cache_dir is None else Path(cache_dir).expanduser()
        self.teacher_cache, self.weights = teacher_cache, weights or {}
        self.disk_limit_gb = disk_limit_gb
        if disk_limit_gb is not None:
            check_disk_limit(
                disk_limit_gb, self.sources["train"], val_split=self.splits["val"],
                test_split=self.splits["test"], limit=limit, weights=weights, teacher_cache=teacher_cache,
            )  # fmt: skip
        self.teacher_hidden: dict[Stage, Sequence[TeacherHidden | None]] = {}
        """Per stage, one store of hidden states (or None) per teacher; see `Collator`."""
        self._renderers: list[ChatRenderer] | None = None
        self._views: dict[Stage, ExampleView] = {}
        self._train_loader: DistillationLoader | RollingLoader | None = None
        self._checks_prompts = False
        self._own = uuid.uuid4().hex
        self._rolling: tuple[str, RollingFiles] | None = None
        self._place: dict[str, Any] | None = None

    @property
    def renderers(self) -> list[ChatRenderer]:
        """How the student (first) and each teacher read a conversation."""
        if self._renderers is None:
            if self.student is None:
                raise UserError(
                    "The data need a `student`: its tokenizer and template turn text into tokens."
                )
            specs = [self.student, *self.teachers]
            self._renderers = [
                ChatRenderer.from_spec(load_tokenizer(spec), spec, self.special_tokens_in_text, self.learn)
                for spec in specs
            ]
        return self._renderers

    @property
    def student_tokenizer(self) -> Any:
        """The student's fast tokenizer."""
        return self.renderers[0].tokenizer

    @property
    def teacher_tokenizers(self) -> list[Any]:
        """One fast tokenizer per teacher."""
        return [renderer.tokenizer for renderer in self.renderers[1:]]

    @property
    def report(self) -> dict[Stage, dict[str, int]]:
        """Per stage: examples ``read`` and ``used``, ``truncated ...``, ``skipped: REASON``, and
        ``examples`` of the stage itself (a held-out share has its file's other counts)."""
        found = {stage: {**view.dataset.report, "examples": len(view)} for stage, view in self._views.items()}
        if isinstance(self._train_loader, RollingLoader) and (counts := self._train_loader.counts):
            found["train"] = {**counts, "examples": counts["used"]}
        return found

    def all_examples(self, stage: Stage) -> ExampleView:
        """As `examples`, for what must see every one of them.

        Raises:
            UserError: they are never on the disk together, or no data are configured for the stage.
        """
        if stage == "train" and self.disk_limit_gb is not None:
            raise UserError(
                "data.disk_limit_gb: the training data are never on the disk together, which a teacher "
                "cache, an endpoint's answers and responses to all prompts need: leave it out, or those."
            )
        return self.examples(stage)

    def examples(self, stage: Stage) -> ExampleView:
        """The raw examples of ``stage``, prepared now if they aren't yet; with a limit on the disk, those
        of the first training file.

        Raises:
            UserError: no data are configured for the stage.
        """
        self._prepare_stage(stage)
        return self._views[stage]

    def preview(self, records: int = 3) -> DataPreview:
        """How student and teachers read the first ``records`` of each file, with counts and lengths.

        A notebook shows it as HTML; `DataPreview.to_dict` holds all of it in plain types.
        """
        stages = [(stage, self.examples(stage), self.report[stage]) for stage in self.stages()]
        names = [model.source for model in (self.student, *self.teachers) if model is not None]
        roles = ["student", "teacher", *(f"teacher{number}" for number in range(2, len(names)))]
        models = [f"{role} {name}" for role, name in zip(roles, names, strict=False)]
        tokenizers = [renderer.tokenizer for renderer in self.renderers]
        return DataPreview.of(models, tokenizers, stages, records)

    def generation_prompt(self, example: Example, model: int = 0, max_length: int | None = None) -> list[int]:
        """Token ids that the student (0) or teacher ``model - 1`` must continue with a response.

        The tokens that training reads before the response: of a conversation the beginning is cut to
        ``max_prompt_length``, and what follows the first response that is learnt is read whole. Where
        that leaves no room for a response in ``max_length``, the whole is cut to ``max_prompt_length``.

        Args:
            example: the conversation; of a document, the prompt is what starts a text.
            model: who answers.
            max_length: most tokens of prompt and response, where that is less than in training.
        """
        renderer = self.renderers[model]
        if example.is_document:
            return list(renderer.render(example).turns[0].prompt_ids)
        more = 0
        if model:
            example, more = example.for_teacher(renderer.system), self.teacher_room
        longest, longest_prompt = self.max_length + more, self.max_prompt_length + more
        reasons = bool(split_reasoning((example.response or "").strip())[0]) or None
        first, *later = renderer.unanswered(
            example.prompt, example.place, tools=example.tools, reasoning=reasons
        ).turns
        ids = cut_left(first.prompt_ids, longest_prompt, renderer.bos_ids) + first.response_ids
        ids += [token for turn in later for token in (*turn.prompt_ids, *turn.response_ids)]
        if len(ids) < min(longest, (max_length or self.max_length) + more):
            return ids
        return cut_left(ids, longest_prompt, renderer.bos_ids)

    @property
    def trains(self) -> bool:
        """Whether there are training data, whatever the Trainer is doing."""
        return self._configured("train")

    def calibration(self, spec: ModelSpec, count: int) -> list[TokenBatch]:
        """Up to ``count`` training examples, evenly spaced, as the source of ``spec`` reads them itself.

        Raises:
            UserError: no example of the training data fits.
        """
        spec = replace(spec, tokenizer=None)  # of the weights, before the vocabulary is swapped
        renderer = ChatRenderer.from_spec(load_tokenizer(spec), spec, self.special_tokens_in_text, self.learn)
        view = self.examples("train")
        chosen = np.unique(np.linspace(0, len(view) - 1, min(count, len(view))).round().astype(int))
        rendered = []
        for index in chosen.tolist():
            cut = truncate(
                [renderer.render(view[index])], self.max_length, self.max_prompt_length, [renderer.bos_ids]
            )
            rendered += [rendered_example(conversation_row(part)) for part in cut.conversations]
        if not rendered:
            raise UserError("None of the training examples leaves room for its response: raise `max_length`.")
        pad = pad_token_id(renderer.tokenizer)
        return [token_batch(rendered[i : i + _TOGETHER], pad) for i in range(0, len(rendered), _TOGETHER)]

    def check_prompts(self) -> None:
        """Check that every training record has a prompt, for which a student can sample.

        Raises:
            UserError: one is a document.
        """
        self._checks_prompts = True
        _check_prompts(self.examples("train"))

    def first_epoch(self) -> npt.NDArray[np.integer]:
        """Rows of the training data that the first epoch reads, in the order of the data."""
        view = self.all_examples("train")
        return np.sort(self._mixture(view).of_epoch(0)) if self.weights else view.indices

    def train_plan(self) -> BatchPlan:
        """This rank's first batches: those of an epoch, or with a limit on the disk of the first file."""
        return self._loader("train", self.examples("train")).batches()

    def prepare_data(self) -> None:
        """Fill the cache in one process, so that the others only map it."""
        for stage in self.stages(None):
            if stage == "train" and self.rolling is not None:
                self.rolling.begin(alone=self._rank == 0)
            self._prepared(stage)

    def setup(self, stage: str) -> None:
        """Map the prepared data of ``fit``, ``validate``, ``test`` or ``predict``."""
        if stage == "fit":
            if self.rolling is not None:
                check_epoch(self.trainer)
                self.rolling.stop(keep_lock=True)
            self._train_loader, self._place = None, None  # of an earlier fit
        for part in self.stages(stage):
            self._prepare_stage(part)
        if stage == "fit" and self.rolling is not None:
            self.rolling.shelf.say_reading(
                self._rank, None
            )  # before any rank begins, after which files may go

    def teardown(self, stage: str) -> None:
        """Take away what was prepared for a training that has ended."""
        if stage == "fit" and self.rolling is not None:
            self.rolling.stop()
            if self.trainer is None or self.trainer.local_rank == 0:
                self.rolling.remove()
            self._views.pop("train", None)

    def on_exception(self, exception: BaseException) -> None:
        """Prepare no more; what is there stays for the resumption."""
        if self._rolling is not None:
            self._rolling[1].stop()

    def train_dataloader(self) -> DistillationLoader | RollingLoader:
        if self.rolling is None:
            self._train_loader = self._loader("train", self.examples("train"))
        else:
            self._train_loader = self._rolling_loader(self.rolling)
        if self._place is not None:
            self._train_loader.load_state_dict(self._place)
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """The training loader's place in its epoch."""
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the place, whether the loader is there already or not.

        Lightning restores a loader's own state only as it builds it, which a `configure_optimizers`
        that asks for ``trainer.estimated_stepping_batches`` has made it do before.

        Raises:
            UserError: the place was saved with other data or batches.
        """
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._place = state_dict["train"]
            if self._train_loader is not None:
                self._train_loader.load_state_dict(self._place)

    def val_dataloader(self) -> DistillationLoader | list[DistillationLoader]:
        return self._loader("val", self.examples("val")) if self._configured("val") else []

    def test_dataloader(self) -> DistillationLoader:
        return self._loader("test", self.examples("test"))

    def predict_dataloader(self) -> DistillationLoader:
        return self._loader("predict", self.examples("predict"))

    def _configured(self, stage: Stage) -> bool:
        if self.sources[stage] is not None:
            return True
        return self.sources["train"] is not None and bool(self.splits.get(stage))

    def stages(self, function: str | None = None) -> list[Stage]:
        """Configured stages of a Trainer function: the given one, the Trainer's, else all."""
        if function is None and self.trainer is not None and self.trainer.state.fn is not None:
            function = {"fitting": "fit", "validating": "validate", "testing": "test"}.get(
                str(self.trainer.state.fn.value), str(self.trainer.state.fn.value)
            )
        wanted = _STAGES_OF.get(function or "", tuple(self.sources))
        return [stage for stage in wanted if self._configured(stage)]

    def _sources_of(self, stage: Stage) -> list[Source]:
        own = self.sources[stage]
        entries = self.sources["train"] if own is None and self.splits.get(stage) else own
        if entries is None:
            raise UserError(f"No data to {stage} on: set `{stage}` to a file, a folder or a Hub dataset.")
        return resolve_sources(entries, _HUB_SPLIT["train" if own is None else stage], self.streaming)

    def _settings(self, stage: Stage) -> PreparationSettings:
        return PreparationSettings(
            format=self.format,
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            system=self.system,
            limit=self.limit,
            skip_invalid=self.skip_invalid,
            needs_response=stage != "predict",
            teachers=tuple(name for name in self.teacher_names if name),
            max_teacher_prompt_length=self.max_prompt_length + self.teacher_room,
        )

    def _prepared(self, stage: Stage) -> PreparedDataset:
        sources, settings = self._sources_of(stage), self._settings(stage)
        if stage == "train" and self.rolling is not None:
            return self.rolling.first()
        return prepare(sources, self.renderers, settings, self.cache_dir, self.num_proc)

    def _prepare_stage(self, stage: Stage) -> None:
        _ = self.rolling  # forgets what was prepared for another run
        if stage in self._views:
            return
        dataset = self._prepared(stage)
        if stage == "train" or self.sources[stage] is None:
            indices = split_indices(len(dataset), self.splits, self.seed)[stage]
        else:
            indices = np.arange(len(dataset))
        self._views[stage] = ExampleView(dataset, indices)

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def rolling(self) -> RollingFiles | None:
        """The training files on a disk with a limit, in a folder of the Trainer's run; None without one."""
        if self.disk_limit_gb is None:
            return None
        # A Trainer's folder is one run's, which may be resumed; without one nothing is kept.
        run = self._own if self.trainer is None else os.path.realpath(self.trainer.default_root_dir)
        if self._rolling is None or self._rolling[0] != run:
            self._views.pop("train", None)
            files = RollingFiles(
                self.cache_dir, run, self._sources_of("train"), self.renderers, self._settings("train"),
                self.disk_limit_gb, self.seed, self.num_proc or usable_cores(),
            )  # fmt: skip
            if self.trainer is None:
                files.remove_in_the_end()
            self._rolling = run, files
        return self._rolling[1]

    def _rolling_loader(self, files: RollingFiles) -> RollingLoader:
        def make(dataset: PreparedDataset) -> DistillationLoader:
            view = ExampleView(dataset, np.arange(len(dataset)))
            if self._checks_prompts:
                _check_prompts(view)
            return self._loader("train", view)

        if self.trainer is None:
            files.begin()
            self.examples("train")  # the first file, before it is decided which one stays
            return files.loader(make)
        return files.loader(
            make,
            self._rank,
            self.trainer.local_rank == 0,
            int(self.trainer.limit_train_batches or 0),
            lambda: self._progress.total.processed,
        )

    def _loader(self, stage: Stage, view: ExampleView) -> DistillationLoader:
        training, trainer = stage == "train", self.trainer
        student, *teachers = self.renderers
        collator = Collator(
            view.dataset,
            pad_ids=[pad_token_id(renderer.tokenizer) for renderer in self.renderers],
            same_tokens=[renderer.fingerprint == student.fingerprint for renderer in teachers],
            packing=self.packing and training,
            pad_to_multiple_of=self.pad_to_multiple_of,
            teacher_hidden=self.teacher_hidden.get(stage, ()),
            teachers=view.dataset.teachers(self.teacher_names),
            tokenizers=tuple(renderer.tokenizer_fingerprint for renderer in self.renderers),
        )
        size = self.batch_size if training else self.eval_batch_size or self.batch_size
        return DistillationLoader(
            collator,
            view.indices,
            BatchSettings(
                size,
                self.max_tokens_per_batch,
                self.packing and training,
                self.max_length + (self.teacher_room if self.teachers else 0),
                self.group_by_length,
            ),
            shuffle=training and not getattr(trainer, "overfit_batches", 0),
            seed=self.seed,
            rank=self._rank,
            ranks=1 if trainer is None else trainer.world_size,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            mixture=self._mixture(view) if training and self.weights else None,
            processed=None if trainer is None or not training else self._processed_batches,
        )

    def _mixture(self, view: ExampleView) -> Mixture:
        given = self.sources["train"]
        assert given is not None
        entries = [given] if isinstance(given, str) else [entry for entry in given if isinstance(entry, str)]
        names, files = view.dataset.sources()
        weights = dict.fromkeys(names, 1.0)
        for entry, weight in self.weights.items():
            if entry not in entries:
                raise UserError(
                    f"`weights` names '{masked(entry)}', which isn't in `train` "
                    f"({', '.join(map(masked, entries))}): correct it."
                )
            if not 0 <= weight < float("inf"):
                raise UserError(f"`weights: {{{masked(entry)}: {weight}}}` must be a number from 0 on.")
            sources = resolve_sources(entry, _HUB_SPLIT["train"], self.streaming)
            weights |= {source.name: weight for source in sources}
        by_file = [weights[name] for name in names]
        lengths = view.dataset.longest(view.indices)
        kinds = files
        if (teachers := view.dataset.teachers(self.teacher_names)) is not None:
            kinds = files * (len(self.teachers) + 1) + teachers + 1  # who take turns have one teacher
            by_file = [weight for weight in by_file for _ in range(len(self.teachers) + 1)]
        mixture = mix(view.indices, lengths, kinds[view.indices], by_file, self.seed)
        if not len(mixture.lengths):
            raise UserError("`weights` leave no example to train on: raise one of them.")
        return mixture

    def _processed_batches(self) -> int:
        progress = self._progress.current
        assert isinstance(progress, _ProcessedTracker)
        return progress.processed

    @property
    def _progress(self) -> Any:
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress


def _check_prompts(view: ExampleView) -> None:
    if (row := view.dataset.first_document(view.indices)) is not None:
        raise UserError(
            f"model.on_policy: the record at {view.row(row).place} is a document without a prompt, for "
            "which the student can sample nothing: leave documents out, or on_policy."
        )


def _nothing(entries: Sources | None) -> bool:
    return entries is None or (isinstance(entries, str | list) and not entries)
