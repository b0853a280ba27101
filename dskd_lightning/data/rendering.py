"""Examples as every model reads them: the same responses, cut to what all of them have room for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dskd_lightning.data.chat import ChatRenderer, Layout, RenderedConversation
from dskd_lightning.data.examples import Example, InvalidRecord, Message
from dskd_lightning.data.formats import Format
from dskd_lightning.data.prepared import conversation_row
from dskd_lightning.data.truncation import truncate, windows

__all__ = ["PreparationSettings", "render_examples"]


@dataclass(frozen=True)
class PreparationSettings:
    """What besides sources and tokenizers decides the prepared tokens.

    Args:
        format: of the records, or ``auto``.
        max_length: most tokens of an example.
        max_prompt_length: most tokens before its first response.
        system: system message for examples without one.
        limit: most examples; None for all.
        skip_invalid: leave out and count invalid records instead of stopping at the first.
        needs_response: False to predict.
        max_teacher_prompt_length: likewise for teachers, whose sequences may be longer by as much.
        teachers: names by which records choose one of several teachers.
    """

    format: Format = "auto"
    max_length: int = 512
    max_prompt_length: int = 256
    system: str | None = None
    limit: int | None = None
    skip_invalid: bool = False
    needs_response: bool = True
    max_teacher_prompt_length: int | None = None
    teachers: tuple[str, ...] = ()

    @property
    def teacher_room(self) -> int:
        """How many more tokens teachers' prompts and sequences may have than the student's."""
        return (self.max_teacher_prompt_length or self.max_prompt_length) - self.max_prompt_length


def render_examples(
    examples: Sequence[Example],
    renderers: Sequence[ChatRenderer],
    settings: PreparationSettings,
    counts: Counter[str],
) -> Iterator[tuple[int, Example, list[dict[str, Any]]]]:
    """``examples`` as the models read them: number, example, and its tokens for each model.

    The tokens are rows as `rendered_example` takes them. Nothing comes of an example where not one token of
    the response has room, one after another for each window of a document; ``counts`` learns what was cut.

    Raises:
        InvalidRecord: one of them can't be learnt from, unless ``skip_invalid``.
    """
    kept: list[tuple[int, Example]] = []
    layouts: list[list[Layout]] = [[] for _ in renderers]
    for number, example in enumerate(examples):
        try:
            read, of_models = _laid_out(example, renderers, counts)
        except InvalidRecord as error:
            if not settings.skip_invalid:
                raise
            counts[f"skipped: {error.reason}"] += 1
            continue
        kept.append((number, read))
        for side, layout in zip(layouts, of_models, strict=True):
            side.append(layout)
    rendered = [renderer.tokenized(side) for renderer, side in zip(renderers, layouts, strict=True)]
    starts = [renderer.bos_ids for renderer in renderers]
    for (number, example), *conversations in zip(kept, *rendered, strict=True):
        if example.is_document:
            for piece, fitted in _windows(example, conversations, settings.max_length, counts):
                yield number, piece, _rows(fitted)
        elif fitted := _cut(conversations, starts, settings, counts):
            yield number, example, _rows(fitted)


def _laid_out(
    example: Example, renderers: Sequence[ChatRenderer], counts: Counter[str]
) -> tuple[Example, list[Layout]]:
    """``example`` as it is kept, and what each model reads of it."""
    if example.is_document:
        return example, [renderer.laid_out(example) for renderer in renderers]
    example = _as_models_read(example, renderers, counts)
    learnt = example if example.response is not None else _with_placeholder(example)
    if example.teacher_messages and renderers[0].learn == "everything":
        raise InvalidRecord(
            f"The record at {example.place} has 'teacher_messages', which the student can't learn: drop "
            "them, or `learn: everything`.",
            "'teacher_messages' under learn: everything",
        )
    teachers = [learnt.for_teacher(renderer.system) for renderer in renderers[1:]]
    if any(renderer.template.drops_reasoning for renderer in renderers):
        teachers = [teacher.without_earlier_reasoning() for teacher in teachers]
    reads = zip(renderers, [learnt, *teachers], strict=True)
    return example, [renderer.laid_out(read) for renderer, read in reads]


def _rows(conversations: Sequence[RenderedConversation]) -> list[dict[str, Any]]:
    return [conversation_row(conversation) for conversation in conversations]


def _cut(
    conversations: Sequence[RenderedConversation],
    starts: Sequence[Sequence[int]],
    settings: PreparationSettings,
    counts: Counter[str],
) -> Sequence[RenderedConversation]:
    cut = truncate(
        conversations, settings.max_length, settings.max_prompt_length, starts, settings.teacher_room
    )
    counts["truncated prompts"] += cut.prompt
    counts["truncated responses"] += cut.response
    counts["skipped: no room for the response"] += not cut.conversations
    return cut.conversations


def _windows(
    example: Example,
    documents: Sequence[RenderedConversation],
    max_length: int,
    counts: Counter[str],
) -> Iterator[tuple[Example, Sequence[RenderedConversation]]]:
    text = example.messages[0].content
    content = text.encode()
    for window in windows([document.turns[0] for document in documents], text, max_length):
        if not window.conversations:
            counts["skipped: no window of a document fits"] += 1
            continue
        piece = Message("assistant", content[window.start : window.end].decode())
        yield replace(example, messages=(piece,)), window.conversations


def _as_models_read(example: Example, renderers: Sequence[ChatRenderer], counts: Counter[str]) -> Example:
    """The one text of every response that all models read, the student's way of calling tools in it."""
    if any(renderer.template.drops_reasoning for renderer in renderers):
        kept = example.without_earlier_reasoning()
        counts["examples without the reasoning of earlier answers"] += kept is not example
        example = kept
    everything = renderers[0].learn == "everything"
    learnt = [m.content for m in example.messages if everything or m.role == "assistant"]
    outer = any(content != content.strip() for content in learnt)
    counts["responses without their outer whitespace"] += outer
    return renderers[0].template.spelled_out(example)


def _with_placeholder(example: Example) -> Example:
    return replace(example, messages=(*example.messages, Message("assistant", "?")))
