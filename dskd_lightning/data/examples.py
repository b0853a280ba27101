"""One instruction with its response or responses, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["Example", "Message", "Role"]

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the response to learn.

    Args:
        messages: system (optional, first), user and assistant turns. Every assistant turn is
            learnt; an example to predict has none at the end.
        references: acceptable final responses, for evaluation; the first is the last message.
        source: the file or dataset that it was read from.
        line: line in that file, or row from 1 where a format has no lines.
    """

    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    source: str = ""
    line: int = 0

    @property
    def place(self) -> str:
        """``file:line``, for messages to the user."""
        return f"{self.source}:{self.line}"

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

    def with_system(self, system: str | None) -> Example:
        """The same example with ``system`` in front, unless it has a system message already."""
        if system is None or self.system is not None:
            return self
        return replace(self, messages=(Message("system", system), *self.messages))
