"""Responses on disk as candidates for training data, those of one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.generation.filtering import Candidate
from dskd_lightning.runs.predictions import Prediction

__all__ = ["ResponseTurns", "Turn", "candidates_by_prompt"]

Turn = tuple[Sequence[int], tuple[list[int], Any]]
"""A prompt's ids, and what `ChatRenderer.response_turn` gave."""


def candidates_by_prompt(
    answered: Mapping[int | None, Sequence[Prediction]],
    scores: Mapping[int | None, Sequence[float | None]],
) -> Iterator[Candidate]:
    """All responses, by prompt and then by seed.

    Args:
        answered: responses to the same prompts by ascending index, by seed.
        scores: nats per token of each, for the seeds for which they were measured.
    """
    for place, same in enumerate(zip(*answered.values(), strict=True)):
        for seed, p in zip(answered, same, strict=True):
            nll = scores[seed][place] if seed in scores else None
            yield Candidate(p.index, p.response, p.tokens, p.finished, nll)


class ResponseTurns(Sequence[Turn]):
    """What a model reads to score responses, each rendered when it is asked for.

    Args:
        renderer: how the model reads a conversation.
        prompts: token ids of each prompt, by index.
        answered: the responses.
        places: which of them.
    """

    def __init__(
        self,
        renderer: ChatRenderer,
        prompts: Sequence[Sequence[int]],
        answered: Sequence[Prediction],
        places: range,
    ) -> None:
        self._renderer, self._prompts, self._answered, self._places = renderer, prompts, answered, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> Turn: ...

    @overload
    def __getitem__(self, at: slice) -> list[Turn]: ...

    def __getitem__(self, at: int | slice) -> Turn | list[Turn]:
        if isinstance(at, slice):
            return [self[place] for place in range(len(self))[at]]
        answer = self._answered[self._places[at]]
        return self._prompts[answer.index], self._renderer.response_turn(
            answer.response, ended=answer.finished
        )
