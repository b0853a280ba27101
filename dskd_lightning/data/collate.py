"""Rendered examples to a padded or packed `DistillationBatch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dskd_lightning.alignment.exact import ExampleAlignment, align_many, batch_alignments
from dskd_lightning.data.batching import Batch
from dskd_lightning.data.prepared import PreparedDataset, RenderedExample
from dskd_lightning.structures import IGNORE_INDEX, Alignment, DistillationBatch, LogProbabilities, TokenBatch

__all__ = ["Collator", "TeacherHidden", "collate", "token_batch"]


class TeacherHidden(Protocol):
    """A store of a teacher's hidden states, as the collator reads it."""

    def get(self, examples: Sequence[int]) -> Sequence[Tensor | LogProbabilities]:
        """Hidden states ``[m, hidden]`` of each example's response positions, or what else is known."""
        ...


@dataclass
class Collator:
    """Builds the batch that a plan's rows name.

    Args:
        dataset: the prepared examples.
        pad_ids: padding token of the student and of each teacher.
        same_tokens: per teacher, whether it gets the student's very token ids; then nothing needs
            aligning.
        packing: rows hold several examples, told apart by position ids that restart.
        pad_to_multiple_of: round the rows' length up, for tensor cores.
        teacher_hidden: per teacher, cached hidden states, log-probabilities or None; empty for none at all.
        teachers: ``[examples]``, the only teacher that answers for each, -1 for all; None where all answer
            for all. Those of a batch are alike.
        tokenizers: fingerprints of those that cut the texts, the student's first, for the batches.
    """

    dataset: PreparedDataset
    pad_ids: Sequence[int]
    same_tokens: Sequence[bool] = ()
    packing: bool = False
    pad_to_multiple_of: int = 1
    teacher_hidden: Sequence[TeacherHidden | None] = ()
    teachers: npt.NDArray[np.int16] | None = None
    tokenizers: tuple[str, ...] = ()

    def __call__(self, rows: Batch) -> DistillationBatch:
        """The batch of ``rows``; of no rows, one without examples (a row without response positions)."""
        filler = not rows
        rows = rows or [[int(self.dataset.longest(range(len(self.dataset))).argmin())]]
        indices = [index for row in rows for index in row]
        only = None if self.teachers is None or filler else int(self.teachers[indices[0]])
        only = None if only == -1 else only
        models = range(len(self.pad_ids))
        read = models if only is None else (0, only + 1)
        batch = collate(
            [
                [[self.dataset.rendered(index, model) for index in row] for row in rows if model in read]
                for model in models
            ],
            self.pad_ids,
            self.same_tokens,
            indices,
            packing=self.packing,
            pad_to_multiple_of=self.pad_to_multiple_of,
            filler=filler,
            teacher=only,
            tokenizers=self.tokenizers,
        )
        if not self.teacher_hidden:
            return batch
        hidden = tuple(
            None if cache is None else _joined(cache, indices, filler or not batch.answers(teacher))
            for teacher, cache in enumerate(self.teacher_hidden)
        )
        return replace(batch, teacher_hidden=hidden)


def collate(
    models: Sequence[Sequence[Sequence[RenderedExample]]],
    pad_ids: Sequence[int],
    same_tokens: Sequence[bool],
    examples: Sequence[int],
    *,
    packing: bool = False,
    pad_to_multiple_of: int = 1,
    filler: bool = False,
    teacher: int | None = None,
    tokenizers: tuple[str, ...] = (),
) -> DistillationBatch:
    """The batch of rendered examples, with which every source of data ends.

    Args:
        models: per model, the student first: rows of the examples that they hold, in the same order.
        pad_ids: padding token of each model.
        same_tokens: per teacher, whether it gets the student's very token ids; then nothing needs aligning.
        examples: number of each example, row by row.
        packing: rows hold several examples, told apart by position ids that restart.
        pad_to_multiple_of: round the rows' length up, for tensor cores.
        filler: nothing of the rows is learnt; the batch counts no examples.
        teacher: the only teacher that answers; rows of the others aren't looked at.
        tokenizers: `DistillationBatch.tokenizers`.
    """
    if teacher is not None:
        models = [rows if model in (0, teacher + 1) else [] for model, rows in enumerate(models)]
    tokens = [
        _tokens(rows, pad, packing, pad_to_multiple_of, filler) if rows else _no_tokens(pad)
        for rows, pad in zip(models, pad_ids, strict=True)
    ]
    flat = [[example for row in rows for example in row] for rows in models]
    read = [[] if filler else side for side in flat]
    return DistillationBatch(
        student=tokens[0],
        examples=torch.tensor([] if filler else examples, dtype=torch.long),
        response_bytes=torch.tensor(
            [sum(turn.length for turn in example.spans) for example in read[0]], dtype=torch.long
        ),
        teachers=tuple(tokens[1:]),
        alignments=tuple(
            None if same else _alignment(read[0] if side else [], side)
            for side, same in zip(read[1:], same_tokens, strict=True)
        ),
        teacher_hidden=(None,) * (len(tokens) - 1),
        padding_share=1.0 - sum(map(len, flat[0])) / tokens[0].input_ids.numel(),
        teacher=teacher,
        tokenizers=tokenizers,
    )


def _no_tokens(pad_id: int) -> TokenBatch:
    """Of a teacher that doesn't answer: a row without response."""
    row, none = torch.full((1, 1), pad_id), torch.empty(0, dtype=torch.long)
    return TokenBatch(row, torch.full_like(row, IGNORE_INDEX), None, torch.zeros_like(row), none, none)


def _tokens(
    rows: Sequence[Sequence[RenderedExample]], pad_id: int, packing: bool, multiple: int, filler: bool
) -> TokenBatch:
    longest = max(sum(map(len, row)) for row in rows)
    width = -(-longest // multiple) * multiple
    shape = (len(rows), width)
    ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
    positions, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    sequence, number = [], 0
    for at, row in enumerate(rows):
        start = 0
        for example in row:
            stop = start + len(example)
            ids[at, start:stop] = example.input_ids
            labels[at, start:stop] = IGNORE_INDEX if filler else example.labels
            positions[at, start:stop] = np.arange(stop - start)
            sequence.append(np.full(0 if filler else len(example.response), number))
            start, number = stop, number + 1
        mask[at, :start] = 1
        # Packed rows take the padding for one more sequence; else positions simply go on.
        positions[at, start:] = np.arange(width - start) + (0 if packing else start)
    return TokenBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        attention_mask=None if packing else torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
        response=torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX)),
        sequence=torch.from_numpy(np.concatenate(sequence).astype(np.int64)),
        extent=(number, max(map(len, sequence))),
    )


def _joined(cache: TeacherHidden, indices: Sequence[int], filler: bool) -> Tensor | LogProbabilities:
    found = cache.get(indices)
    if isinstance(found[0], LogProbabilities):
        told = [part for part in found if isinstance(part, LogProbabilities)]
        joined = LogProbabilities(
            torch.cat([part.ids for part in told]), torch.cat([part.values for part in told])
        )
        return joined[:0] if filler else joined
    hidden = torch.cat([part for part in found if isinstance(part, Tensor)])
    return hidden[:0] if filler else hidden


def _alignment(student: Sequence[RenderedExample], teacher: Sequence[RenderedExample]) -> Alignment:
    """Turns are aligned one by one; byte offsets go on from turn to turn of an example."""
    pieces = align_many(
        [turn for example in student for turn in example.spans],
        [turn for example in teacher for turn in example.spans],
    )
    moved: list[ExampleAlignment] = []
    for example in student:
        base = 0
        for turn in example.spans:
            piece = pieces[len(moved)]
            moved.append(
                replace(piece, student_end=piece.student_end + base, teacher_end=piece.teacher_end + base)
            )
            base += turn.length + 1  # and the end of the turn
    return batch_alignments(moved)


def token_batch(
    examples: Sequence[RenderedExample], pad_id: int, device: torch.device | str = "cpu"
) -> TokenBatch:
    """One example a row, right-padded, for one model."""
    shape = (len(examples), max(map(len, examples)))
    ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
    mask = np.zeros(shape, np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = example.input_ids
        labels[row, : len(example)] = example.labels
        mask[row, : len(example)] = 1
    response = np.flatnonzero(labels != IGNORE_INDEX)
    batch = TokenBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.arange(shape[1]).expand(shape),
        response=torch.from_numpy(response),
        sequence=torch.from_numpy(response // shape[1]),
        extent=(len(examples), int((labels != IGNORE_INDEX).sum(1).max())),
    )
    return batch.to(device)
