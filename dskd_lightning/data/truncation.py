"""Cut the renderings of one text so that every model still reads the same of it: conversations end
early, documents go on in the next window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dskd_lightning.alignment.byte_spans import ByteSpans
from dskd_lightning.data.chat import RenderedConversation, RenderedTurn

__all__ = ["Truncated", "Window", "cut_left", "truncate", "windows"]


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
    teacher_room: int = 0,
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
        teacher_room: that many more tokens, of the prompt and in all, for models behind the first.
    """
    count = len(conversations)
    kept: list[list[RenderedTurn]] = [[] for _ in range(count)]
    more = [0] + [teacher_room] * (count - 1)
    room = [max_length + extra for extra in more]
    prompt_cut = response_cut = False
    for index, turns in enumerate(zip(*(c.turns for c in conversations), strict=True)):
        prompts = [turn.prompt_ids for turn in turns]
        if index == 0:
            prompts = [
                cut_left(ids, max_prompt_length + extra, start)
                for ids, start, extra in zip(prompts, start_ids, more, strict=True)
            ]
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


@dataclass(frozen=True)
class Window:
    """A piece of a document.

    Args:
        start: its first byte.
        end: one past its last byte.
        conversations: one per model; empty where no piece that starts here fits all of them.
    """

    start: int
    end: int
    conversations: tuple[RenderedConversation, ...]


def windows(documents: Sequence[RenderedTurn], text: str, max_length: int) -> Iterator[Window]:
    """Pieces of at most ``max_length`` tokens per model that follow each other without a hole.

    A window ends behind the last character where tokens of every model end, the last one with the end
    of the document. Tokens are those of the whole document, so that a window may begin within a word.

    Args:
        documents: the whole document for each model.
        text: of the document.
        max_length: most tokens of a window, the tokens in front of it included.
    """
    content = np.frombuffer(text.encode(), np.uint8)
    borders = np.flatnonzero(np.append(content, 0) & 0xC0 != 0x80)  # between characters
    for document in documents:
        borders = np.intersect1d(borders, document.spans.ends[~document.spans.end])
    counts = [  # tokens up to each border, the end token apart
        np.searchsorted(document.spans.ends[~document.spans.end], borders, "right") for document in documents
    ]
    room = [max_length - len(document.prompt_ids) for document in documents]
    at, start = [0] * len(documents), 0
    while start < len(content):
        sizes = [len(document.spans) - done for document, done in zip(documents, at, strict=True)]
        if all(size <= space for size, space in zip(sizes, room, strict=True)):
            yield Window(start, len(content), _pieces(documents, at, sizes, start, len(content)))
            return
        following = int(np.searchsorted(borders, start, "right"))
        last = min(
            int(np.searchsorted(count, done + space, "right")) - 1
            for count, done, space in zip(counts, at, room, strict=True)
        )
        fits = last >= following
        if not fits and following == len(borders):
            yield Window(start, len(content), ())
            return
        border = last if fits else following
        cut, until = int(borders[border]), [int(count[border]) for count in counts]
        taken = [new - done for new, done in zip(until, at, strict=True)]
        yield Window(start, cut, _pieces(documents, at, taken, start, cut) if fits else ())
        at, start = until, cut


def _pieces(
    documents: Sequence[RenderedTurn], at: Sequence[int], sizes: Sequence[int], start: int, end: int
) -> tuple[RenderedConversation, ...]:
    made = []
    for document, done, size in zip(documents, at, sizes, strict=True):
        kept, spans = slice(done, done + size), document.spans
        piece = ByteSpans(
            spans.starts[kept] - start, spans.ends[kept] - start, spans.unknown[kept], spans.added[kept],
            spans.end[kept], end - start, spans.normalized,
        )  # fmt: skip
        turn = RenderedTurn(document.prompt_ids, document.response_ids[kept], piece)
        made.append(RenderedConversation((turn,)))
    return tuple(made)


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
