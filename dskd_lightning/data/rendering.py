"""One example as every model reads it: the same responses, cut to what all of them have room for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.examples import Example, InvalidRecord, Message
from dskd_lightning.data.formats import Format
from dskd_lightning.data.prepared import conversation_row
from dskd_lightning.data.truncation import truncate, windows

__all__ = ["PreparationSettings", "render_example"]


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


def render_example(
    example: Example,
    renderers: Sequence[ChatRenderer],
    settings: PreparationSettings,
    counts: Counter[str],
) -> Iterator[tuple[Example, list[dict[str, Any]]]]:
    """``example`` as the models read it, and its tokens for each of them as `rendered_example` takes them.

    Nothing where not one token of the response has room, a pair for each window of a document;
    ``counts`` learns what was cut.
    """
    if example.is_document:
        yield from _windows(example, renderers, settings, counts)
        return
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
    rendered = [renderer.render(read) for renderer, read in zip(renderers, [learnt, *teachers], strict=True)]
    starts = [renderer.bos_ids for renderer in renderers]
    cut = truncate(rendered, settings.max_length, settings.max_prompt_length, starts, settings.teacher_room)
    counts["truncated prompts"] += cut.prompt
    counts["truncated responses"] += cut.response
    counts["skipped: no room for the response"] += not cut.conversations
    if cut.conversations:
        yield example, [conversation_row(conversation) for conversation in cut.conversations]


def _windows(
    example: Example,
    renderers: Sequence[ChatRenderer],
    settings: PreparationSettings,
    counts: Counter[str],
) -> Iterator[tuple[Example, list[dict[str, Any]]]]:
    text = example.messages[0].content
    content, documents = text.encode(), [renderer.render(example).turns[0] for renderer in renderers]
    for window in windows(documents, text, settings.max_length):
        if not window.conversations:
            counts["skipped: no window of a document fits"] += 1
            continue
        piece = Message("assistant", content[window.start : window.end].decode())
        rows = [conversation_row(conversation) for conversation in window.conversations]
        yield replace(example, messages=(piece,)), rows


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
