"""Cut the renderings of one conversation so that every model still reads the same responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dskd_lightning.alignment.byte_spans import ByteSpans
from dskd_lightning.data.chat import RenderedConversation, RenderedTurn

__all__ = ["Truncated", "cut_left", "truncate"]


@dataclass(frozen=True)
class Truncated:
    """Renderings that fit.

    Args:
        conversations: one per model, with the same turns; empty where not one response token fits.
        prompt: whether a prompt lost tokens.
        response: whether a response lost text.
    """

    conversations: tuple[RenderedConversation, ...]
    prompt: bool = False
    response: bool = False


def truncate(
    conversations: Sequence[RenderedConversation],
    max_length: int,
    max_prompt_length: int,
    start_ids: Sequence[Sequence[int]],
) -> Truncated:
    """Cut to ``max_length`` tokens per model.

    The prompt (everything before the first response) loses tokens at its left, its start token
    excepted. A response that is too long for any model is cut for all of them behind the last byte
    where tokens of every model end; it then has no end-of-turn token, and later turns are dropped.

    Args:
        conversations: the same conversation for each model.
        max_length: most tokens of a sequence, the last end-of-turn token included.
        max_prompt_length: most tokens of the prompt.
        start_ids: per model, ids (BOS) that stay in front of a cut prompt.
    """
    count = len(conversations)
    kept: list[list[RenderedTurn]] = [[] for _ in range(count)]
    room = [max_length] * count
    prompt_cut = response_cut = False
    for index, turns in enumerate(zip(*(c.turns for c in conversations), strict=True)):
        prompts = [turn.prompt_ids for turn in turns]
        if index == 0:
            prompts = [cut_left(ids, max_prompt_length, s) for ids, s in zip(prompts, start_ids, strict=True)]
            prompt_cut = any(
                len(new) < len(turn.prompt_ids) for new, turn in zip(prompts, turns, strict=True)
            )
        left = [space - len(ids) for space, ids in zip(room, prompts, strict=True)]
        fits = all(len(turn.response_ids) <= space for turn, space in zip(turns, left, strict=True))
        cut = -1 if fits else _shared_end([turn.spans for turn in turns], left)
        if cut == 0:
            response_cut = True
            break
        for side, (turn, prompt) in enumerate(zip(turns, prompts, strict=True)):
            response, spans = (turn.response_ids, turn.spans) if fits else _cut_right(turn, cut)
            kept[side].append(replace(turn, prompt_ids=prompt, response_ids=response, spans=spans))
            room[side] = left[side] - len(response)
        if not fits:
            response_cut = True
            break
    if not kept[0]:
        return Truncated((), prompt_cut, response_cut)
    return Truncated(tuple(RenderedConversation(tuple(turns)) for turns in kept), prompt_cut, response_cut)


def cut_left(ids: list[int], limit: int, start: Sequence[int]) -> list[int]:
    """The last ``limit`` of ``ids``, with ``start`` kept in front if they began with it."""
    if len(ids) <= limit:
        return ids
    lead = list(start) if list(ids[: len(start)]) == list(start) and len(start) < limit else []
    return lead + ids[len(ids) - (limit - len(lead)) :]


def _shared_end(spans: Sequence[ByteSpans], room: Sequence[int]) -> int:
    """Last byte offset at which tokens of every side end that fit its room; 0 if there is none."""
    shared: npt.NDArray[np.int32] | None = None
    for side, space in zip(spans, room, strict=True):
        ends = side.ends[: max(0, space)][~side.end[: max(0, space)]]
        shared = np.unique(ends) if shared is None else np.intersect1d(shared, ends)
    assert shared is not None
    for cut in shared[::-1].tolist():
        if all(_tokens_until(side, cut) <= space for side, space in zip(spans, room, strict=True)):
            return int(cut)
    return 0


def _tokens_until(spans: ByteSpans, cut: int) -> int:
    """Number of tokens, the end token apart, that end at or before byte ``cut``."""
    return int(np.count_nonzero((spans.ends <= cut) & ~spans.end))


def _cut_right(turn: RenderedTurn, cut: int) -> tuple[list[int], ByteSpans]:
    kept = slice(0, _tokens_until(turn.spans, cut))
    spans = turn.spans
    return turn.response_ids[kept], ByteSpans(
        spans.starts[kept], spans.ends[kept], spans.unknown[kept], spans.added[kept], spans.end[kept],
        cut, spans.normalized,
    )  # fmt: skip
