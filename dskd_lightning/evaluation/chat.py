"""Conversations with one or several models, to feel what a table says of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dskd_lightning.data.chat import ChatRenderer
from dskd_lightning.data.examples import Message
from dskd_lightning.errors import UserError
from dskd_lightning.generation.generator import Generator

__all__ = ["Speaker", "together"]

logger = logging.getLogger(__name__)


@dataclass
class Speaker:
    """A model that takes part in a conversation.

    Args:
        name: what to call it.
        generator: the model with its settings.
        renderer: how it reads a conversation.
        system: a system message in front of it, or None.
    """

    name: str
    generator: Generator
    renderer: ChatRenderer
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def forget(self) -> None:
        """Start anew."""
        self.messages.clear()

    def room(self) -> int | None:
        """Most tokens of what it reads before it answers; None where the model has no limit.

        Raises:
            UserError: answers of ``max_new_tokens`` leave none.
        """
        config: Any = self.generator.model.config
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        answer = self.generator.settings.max_new_tokens
        if most is not None and most <= answer:
            raise UserError(
                f"{self.name} reads {most} tokens in all, and answers of {answer} leave no room for a "
                "question: lower --max_new_tokens."
            )
        return None if most is None else most - answer

    def answer(self, question: str, told: Callable[[str], None], seed: int | None = None) -> str:
        """The model's next turn, after all that was said so far; what has no room is forgotten first.

        Args:
            question: the user's turn.
            told: called with the text so far after each token.
            seed: samples with this seed; None decodes greedily.

        Raises:
            UserError: the question alone is too long for the model.
        """
        before = list(self.messages)
        self.messages.append(Message("user", question))
        try:
            prompt = self._prompt()
            turn = sum(message.role == "user" for message in self.messages)
            text = self.generator.stream(prompt, told, seed=seed, index=turn).text
        except BaseException:
            self.messages[:] = before  # interrupted or refused: as if it had not been asked
            raise
        self.messages.append(Message("assistant", text or " "))
        return text

    def _prompt(self) -> Sequence[int]:
        room = self.room()
        while True:
            asked = self.messages
            if self.system and asked[0].role != "system":
                asked = [Message("system", self.system), *asked]
            ids = self.renderer.generation_prompt(asked)
            if room is None or len(ids) <= room:
                return ids
            if len(self.messages) == 1:
                raise UserError(
                    f"{self.name} has room for {room} tokens beside an answer of "
                    f"{self.generator.settings.max_new_tokens}, and the question has {len(ids)}: ask a "
                    "shorter one or lower --max_new_tokens."
                )
            del self.messages[:2]
            logger.warning("%s forgets the oldest turns, for which it has no room.", self.name)


@contextlib.contextmanager
def together(speakers: Sequence[Speaker]) -> Iterator[None]:
    """A turn that all take part in or, where one of them is interrupted or refuses, none remembers."""
    before = [list(speaker.messages) for speaker in speakers]
    try:
        yield
    except BaseException:
        for speaker, messages in zip(speakers, before, strict=True):
            speaker.messages[:] = messages
        raise
