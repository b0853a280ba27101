"""One instruction with its response or responses, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dskd_lightning.errors import UserError

__all__ = ["Example", "InvalidRecord", "Message", "Role"]

Role = Literal["system", "user", "assistant", "tool"]


class InvalidRecord(UserError):
    """A record that can't be learnt from. ``reason`` is a short phrase to count it under."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[InvalidRecord], tuple[str, str]]:
        return type(self), (str(self), self.reason)  # from a process that prepares data


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: who speaks.
        content: the text; an answer's reasoning stands in front of it in ``<think>`` tags.
        learnt: whether an assistant turn is learnt or only read.
        extra: JSON object of what templates read besides (``tool_calls``, ``name``, ``tool_call_id``).
        special: the text was written by a template, so special tokens' strings in it are tokens.
    """

    role: Role
    content: str
    learnt: bool = True
    extra: str = ""
    special: bool = False

    @property
    def empty(self) -> bool:
        """Whether it says nothing and calls nothing."""
        return not self.content.strip() and '"tool_calls"' not in self.extra


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the response to learn.

    Args:
        messages: system (optional, first), user, assistant and tool turns. Every assistant turn
            is learnt unless it says otherwise; an example to predict has none at the end. A
            document, or a piece of one, is an assistant turn alone.
        references: acceptable final responses, for evaluation; the first is the last message.
        source: the file or dataset that it was read from.
        line: line in that file, or row from 1 where a format has no lines.
        tools: JSON list of the functions that the model may call, or nothing.
        fields: JSON object of the record's fields that nothing reads, or nothing.
        teacher_messages: all that teachers read in front of the response, where that isn't what the
            student reads; the last message is then the one that is learnt.
        teacher: name of the only teacher that answers for it; empty for all.
    """

    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    source: str = ""
    line: int = 0
    tools: str = ""
    fields: str = ""
    teacher_messages: tuple[Message, ...] = ()
    teacher: str = ""

    @property
    def place(self) -> str:
        """``file:line``, for messages to the user."""
        return f"{self.source}:{self.line}"

    @property
    def is_document(self) -> bool:
        """Whether it is a text without a prompt."""
        return len(self.messages) == 1 and self.messages[0].role == "assistant"

    @property
    def system(self) -> str | None:
        """The system message, or None."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else None

    @property
    def response(self) -> str | None:
        """The last assistant turn, or None where it is to be predicted."""
        return self.messages[-1].content if self.messages and self.messages[-1].role == "assistant" else None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation up to the final response."""
        return self.messages[:-1] if self.response is not None else self.messages

    def without_earlier_reasoning(self) -> Example:
        """Answers before the last question without their reasoning, read but not learnt.

        Templates that drop it there show the model a text that it never wrote.
        """
        last = max((i for i, message in enumerate(self.messages) if message.role == "user"), default=0)
        messages = list(self.messages)
        for index, message in enumerate(messages[:last]):
            thought, tag, answer = message.content.partition("</think>")
            if message.role == "assistant" and tag and thought.lstrip().startswith("<think>"):
                messages[index] = replace(message, content=answer.strip(), learnt=False)
        return self if messages == list(self.messages) else replace(self, messages=tuple(messages))

    def for_teacher(self, system: str | None = None) -> Example:
        """What a teacher reads: the same response behind its own messages, or its own system message.

        Args:
            system: the teacher's own, in the place of the record's; of ``teacher_messages`` only in front
                of those that have none. An empty one takes the record's away.
        """
        if self.teacher_messages:
            answer = self.messages[-1:] if self.response is not None else ()
            own = replace(self, messages=(*self.teacher_messages, *answer))
            return own.with_system(system or None)
        if system is None or self.is_document:
            return self
        rest = self.messages if self.system is None else self.messages[1:]
        return replace(self, messages=(Message("system", system), *rest) if system else rest)

    def with_system(self, system: str | None) -> Example:
        """The same example with ``system`` in front, unless it has a system message already."""
        if system is None or self.system is not None or self.is_document:
            return self
        return replace(self, messages=(Message("system", system), *self.messages))
