"""A batch of the dataset's responses turned into one of responses that the student sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dskd_lightning.alignment.sampled_text import sampled_text
from dskd_lightning.data.chat import ChatRenderer, RenderedConversation, RenderedTurn
from dskd_lightning.data.collate import collate
from dskd_lightning.data.prepared import RenderedExample, conversation_row, rendered_example
from dskd_lightning.generation.samples import Sample, repetition
from dskd_lightning.models.tokenizer import pad_token_id
from dskd_lightning.structures import DistillationBatch, TokenBatch

__all__ = ["BatchOfSamples", "prompts_of"]


def prompts_of(tokens: TokenBatch) -> list[list[int]]:
    """Per example of the batch the tokens in front of its last response."""
    response, sequence = tokens.response.numpy(), tokens.sequence.numpy()
    if not len(response):
        return []
    ids, positions = tokens.input_ids.flatten().numpy(), tokens.position_ids.flatten().numpy()
    # A position that predicts a response token, but whose predecessor predicts none.
    opens = np.append(True, (np.diff(response) > 1) | (np.diff(sequence) > 0))
    first = response[opens]
    last_turn = np.append(np.diff(sequence[opens]) > 0, True)
    return [ids[at - positions[at] : at + 1].tolist() for at in first[last_turn]]


@dataclass(frozen=True)
class BatchOfSamples:
    """Puts samples in the place of a batch's last responses.

    Args:
        student: the student's tokenizer, whose ids the samples are.
        teachers: how each teacher reads a conversation.
    """

    student: Any
    teachers: Sequence[ChatRenderer] = ()

    def __call__(self, batch: DistillationBatch, samples: Sequence[Sequence[Sample]]) -> DistillationBatch:
        """The batch of ``samples``, given per example, each one after the example's own prompt.

        The student's tokens are the sampled ids. So are those of a teacher that reads the student's ids;
        another one tokenises the text that they spell, and the two are aligned by bytes.
        """
        if not len(batch):
            return replace(batch, samples=_statistics(()))
        flat = [sample for several in samples for sample in several]
        times = [len(several) for several in samples]
        texts = [sampled_text(self.student, sample.ids) for sample in flat]
        turns = []
        for sample, (_, spans) in zip(flat, texts, strict=True):
            ids = [*sample.ids] if sample.stop is None else [*sample.ids, sample.stop]
            turns.append((ids, spans if sample.stop is None else spans.with_end()))
        models = [_rendered(batch.student, times, turns)]
        same = [alignment is None for alignment in batch.alignments]
        for index, (renderer, tokens, shares_ids) in enumerate(
            zip(self.teachers, batch.teachers, same, strict=True)
        ):
            if not batch.answers(index):
                models.append([])
                continue
            theirs = turns
            if not shares_ids:
                theirs = [
                    renderer.response_turn(text, ended=sample.stop is not None)
                    for sample, (text, _) in zip(flat, texts, strict=True)
                ]
            models.append(_rendered(tokens, times, theirs))
        made = collate(
            [[[example] for example in side] for side in models],
            [pad_token_id(self.student), *(pad_token_id(teacher.tokenizer) for teacher in self.teachers)],
            same,
            np.repeat(batch.examples.numpy(), times).tolist(),
            teacher=batch.teacher,
        )
        return replace(made, samples=_statistics(flat))


def _rendered(
    tokens: TokenBatch, times: Sequence[int], turns: Sequence[tuple[Any, Any]]
) -> list[RenderedExample]:
    prompts = [prompt for prompt, count in zip(prompts_of(tokens), times, strict=True) for _ in range(count)]
    return [
        rendered_example(conversation_row(RenderedConversation((RenderedTurn(prompt, list(ids), spans),))))
        for prompt, (ids, spans) in zip(prompts, turns, strict=True)
    ]


def _statistics(samples: Sequence[Sample]) -> torch.Tensor:
    """``[4, 2]``, sums and counts in the order of `SAMPLE_STATISTICS`."""
    count = len(samples)
    (repeated_2, pairs), (repeated_4, fours) = (repetition(samples, size) for size in (2, 4))
    return torch.tensor(
        [
            [sum(len(sample.ids) for sample in samples), count],
            [sum(sample.stop is not None for sample in samples), count],
            [pairs - repeated_2, pairs],
            [repeated_4, fours],
        ],
        dtype=torch.float32,
    )
