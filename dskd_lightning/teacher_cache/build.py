"""Computes a teacher's states and writes them shard by shard."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dskd_lightning.data.batching import BatchSettings, plan_batches
from dskd_lightning.data.collate import token_batch
from dskd_lightning.data.prepared import PreparedDataset
from dskd_lightning.errors import UserError
from dskd_lightning.models.output import decoder_hidden, language_head
from dskd_lightning.runs.heartbeat import Progress
from dskd_lightning.runs.text import byte_count
from dskd_lightning.teacher_cache.codecs import bytes_per_token, decode, encode
from dskd_lightning.teacher_cache.loss import StorageError
from dskd_lightning.teacher_cache.manifest import Layout, Manifest
from dskd_lightning.teacher_cache.shards import check_shard, shard_name, write_shard

__all__ = ["StateBuilder", "shard_tokens", "token_batch"]

_log = logging.getLogger(__name__)

_SHARD_TOKENS = 32_768
_SHARD_BYTES = 128 * 2**20
_SPARE_BYTES = 64 * 2**20
_SAMPLED_ROWS = 64


def shard_tokens(bytes_per_row: int) -> int:
    """Most response tokens of a shard: what a killed build may lose."""
    return max(1, min(_SHARD_TOKENS, _SHARD_BYTES // bytes_per_row))


class StateBuilder:
    """Fills one cache folder, whose manifest and index are written already.

    Args:
        folder: of the cache.
        manifest: its manifest.
        layout: its layout.
        dataset: the prepared examples.
        model_index: the teacher's number in them; the student is 0.
        pad_id: the teacher's padding token.
        tokens_per_batch: most tokens of a batch, padding included.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        layout: Layout,
        dataset: PreparedDataset,
        model_index: int,
        pad_id: int,
        tokens_per_batch: int,
    ) -> None:
        self.folder, self.manifest, self.layout = folder, manifest, layout
        self.dataset, self.model_index, self.pad_id = dataset, model_index, pad_id
        self.tokens_per_batch = tokens_per_batch
        self._row_bytes = bytes_per_token(manifest.hidden_size, manifest.dtype)

    def announce(self, vocab_size: int, rank: int = 0, ranks: int = 1) -> None:
        """Log what will be written, and refuse where the disk is too small for it.

        How long it takes is told once the first batch has been timed.

        Args:
            vocab_size: of the teacher.
            rank: see `build`; ranks that write to one disk are counted as one.
            ranks: see `build`.

        Raises:
            UserError: there isn't enough space.
        """
        mine = range(rank, self.layout.shards, ranks)
        missing = sorted(set(self.layout.missing(self.folder)).intersection(mine))
        left = sum(self.layout.tokens(shard) for shard in missing)
        needed = left * self._row_bytes
        free = shutil.disk_usage(self.folder).free
        _log.info(
            "Teacher cache in '%s': %s examples, %s response tokens, %s (their logits in bfloat16 would be "
            "%s). %s of %s shards are missing%s: %s, with %s free.",
            self.folder, f"{len(self.dataset):,}", f"{self.layout.total:,}",
            byte_count(self.layout.total * self._row_bytes), byte_count(self.layout.total * vocab_size * 2),
            len(missing), len(mine), "" if ranks == 1 else f" of part {rank + 1} of {ranks}",
            byte_count(needed), byte_count(free),
        )  # fmt: skip
        if needed + _SPARE_BYTES > free:
            raise UserError(
                f"The teacher cache needs {byte_count(needed + _SPARE_BYTES)} in '{self.folder}', where "
                f"{byte_count(free)} are free: free space, set `teacher_cache.folder` to another disk, or "
                "store int8 or int4."
            )

    def build(self, teacher: PreTrainedModel, rank: int = 0, ranks: int = 1) -> StorageError:
        """Compute the missing shards of this rank; finished ones stay.

        Args:
            teacher: in eval mode, on the device to run on.
            rank: this process's.
            ranks: number of processes that share the shards.

        Returns:
            What storing lost, measured on a few rows of each shard written here.

        Raises:
            UserError: a finished shard is damaged, or the disk is full.
        """
        missing = set(self.layout.missing(self.folder))
        mine = [shard for shard in range(rank, self.layout.shards, ranks) if shard in missing]
        for shard in range(rank, self.layout.shards, ranks):
            if shard not in missing:
                check_shard(self.folder / shard_name(shard), self.manifest.key, content=False)
        self._remove_leftovers()
        error, total = StorageError(), sum(map(self.layout.tokens, mine))
        head = language_head(teacher).detach()
        with Progress("Teacher cache", total, "response tokens") as progress:
            for shard in mine:
                hidden = self.states(teacher, shard, progress)
                stored = encode(hidden, self.manifest.dtype)
                write_shard(self.folder / shard_name(shard), stored, self.manifest.key)
                sample = slice(0, _SAMPLED_ROWS)
                dtype = getattr(torch, self.manifest.teacher_dtype)
                error.update(hidden[sample], decode(stored, sample, dtype), head)
            if mine:
                progress.say()
        return error

    @torch.no_grad()
    def states(self, teacher: PreTrainedModel, shard: int, progress: Progress | None = None) -> Tensor:
        """``[tokens, hidden]`` of a shard's examples in their order, on the CPU."""
        first = self.layout.examples(shard).start
        rows = self.layout.tokens(shard)
        hidden = torch.empty(
            rows, self.manifest.hidden_size, dtype=getattr(torch, self.manifest.teacher_dtype)
        )
        for batch in self._batches(shard):
            examples = [self.dataset.rendered(first + index, self.model_index) for index in batch]
            tokens = token_batch(examples, self.pad_id, teacher.device)
            found = tokens.select(decoder_hidden(teacher, tokens)).to("cpu", hidden.dtype)
            places = [self.layout.place(first + index)[1] for index in batch]
            for place, part in zip(places, found.split([p.stop - p.start for p in places]), strict=True):
                hidden[place] = part
            if progress is not None:
                first_of_all = not progress.done
                progress.done += len(found)
                if first_of_all:
                    progress.say()
        return hidden

    def _batches(self, shard: int) -> Iterator[list[int]]:
        examples = self.layout.examples(shard)
        answered = np.flatnonzero(self.layout.counts(shard))
        lengths = self.dataset.lengths[examples.start : examples.stop, self.model_index][answered]
        settings = BatchSettings(max_tokens=self.tokens_per_batch)
        for batch in plan_batches(lengths, settings, shuffle=False):
            yield [int(answered[index]) for row in batch for index in row]

    def _remove_leftovers(self) -> None:
        """Unfinished files of a killed build; young ones may be another process's at work."""
        for path in self.folder.glob(".shard-*"):
            with contextlib.suppress(OSError):  # another process has finished it, or was faster
                if time.time() - path.stat().st_mtime > 3600:
                    path.unlink()
