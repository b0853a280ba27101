"""Conversations as the text and tokens of one model, with its responses marked.

Templates need no ``{% generation %}`` tag. The conversation is rendered once with a placeholder
for each assistant turn; what lies between the placeholders is the template's text. Prompt and
response pieces are tokenised *separately*, so that the tokens before a response are the ones that
generation will see, and no token straddles the boundary. A SentencePiece tokenizer with a prefix
space thus starts every response with its ``▁`` token, which stands for no byte of the response
and which decoding removes: the form in which such a model answers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dskd_lightning.alignment.byte_spans import ByteSpans, token_byte_spans
from dskd_lightning.alignment.token_bytes import token_bytes
from dskd_lightning.data.examples import Example, Message
from dskd_lightning.errors import UserError
from dskd_lightning.models.spec import ModelSpec
from dskd_lightning.tokenizers import tokenizer_fingerprint

__all__ = ["ChatRenderer", "RenderedConversation", "RenderedTurn"]

_log = logging.getLogger(__name__)
_MARK = "\ue000response-{}\ue001"  # private-use characters: no template or tokenizer touches them


@dataclass(frozen=True)
class RenderedTurn:
    """The tokens up to one response and the response's own.

    Args:
        prompt_ids: template and user text since the previous response.
        response_ids: the response and, at the end, the token that closes the turn.
        spans: bytes of the response that each of ``response_ids`` covers.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    spans: ByteSpans


@dataclass(frozen=True)
class RenderedConversation:
    """All turns of one example for one model; token ids concatenate to the model's input."""

    turns: tuple[RenderedTurn, ...]


class ChatRenderer:
    """Renders conversations for one model.

    Args:
        tokenizer: the model's fast tokenizer; its chat template is used unless ``prompt_template``.
        prompt_template: a format string with ``{prompt}`` and optionally ``{system}``, applied to
            each user turn (the system text to the first). A BOS token is put in front where the
            tokenizer adds one by itself.

    Raises:
        UserError: no template at all, a template without ``{prompt}``, or no token that could end
            a response.
    """

    def __init__(self, tokenizer: Any, prompt_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.prompt_template = prompt_template
        self.bos_ids = self._leading_ids()
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if prompt_template is not None:
            self._check_prompt_template(prompt_template)
        elif not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer '{name}' has no chat template: set the model's `prompt_template` (for "
                r'example "### Instruction:\n{prompt}\n\n### Response:\n") or `chat_template`.'
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer '{name}' has no end-of-sequence token: set `eos_token` in its "
                "tokenizer_config.json."
            )
        self._specials = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    @classmethod
    def from_spec(cls, tokenizer: Any, spec: ModelSpec | None) -> ChatRenderer:
        """The renderer of the model that ``spec`` describes."""
        return cls(tokenizer, None if spec is None else spec.prompt_template)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for renderers that give every conversation the same tokens."""
        template = self.prompt_template if self.prompt_template is not None else self.tokenizer.chat_template
        parts = [
            tokenizer_fingerprint(self.tokenizer),
            template,
            self.tokenizer.special_tokens_map,
            self.bos_ids,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def render(self, example: Example) -> RenderedConversation:
        """Tokens of ``example``, which ends with a response; responses are stripped of outer whitespace.

        Raises:
            UserError: the template refuses the conversation.
        """
        responses = [m.content.strip() for m in example.messages if m.role == "assistant"]
        texts = self._texts_around_responses(example.messages, example.place)
        turns = []
        before = texts[0]
        for index, (response, after) in enumerate(zip(responses, texts[1:], strict=True)):
            end_id, before_next = self._split_end(after)
            prompt_ids = self._tokenize(before)
            if index == 0:
                prompt_ids = self._with_start(prompt_ids)
            response_ids = self._tokenize(response)
            spans = token_byte_spans(self.tokenizer, response, response_ids, end_ids=()).with_end()
            turns.append(RenderedTurn(prompt_ids, [*response_ids, end_id], spans))
            before = before_next
        return RenderedConversation(tuple(turns))

    def generation_prompt(self, messages: Sequence[Message], place: str = "") -> list[int]:
        """Token ids after which the model must answer; the same as those a response was trained after."""
        example = Example((*messages, Message("assistant", "?")), source=place)
        turns = self.render(example).turns
        past = [token for turn in turns[:-1] for token in (*turn.prompt_ids, *turn.response_ids)]
        return past + turns[-1].prompt_ids

    def prompt_text(self, messages: Sequence[Message], place: str = "") -> str:
        """The text of `generation_prompt`, for people to read."""
        texts = self._texts_around_responses((*messages, Message("assistant", "?")), place)
        responses = [m.content.strip() for m in messages if m.role == "assistant"]
        return "".join(text for pair in zip(texts, [*responses, ""], strict=False) for text in pair)

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = token_bytes(self.tokenizer).tracer.encode(text, add_special_tokens=False).ids
        return ids

    def _leading_ids(self) -> list[int]:
        """What the tokenizer puts in front of every text by itself: usually BOS or nothing."""
        plain, full = self._tokenize("a"), self.tokenizer("a")["input_ids"]
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return list(full[:start])
        return []

    def _with_start(self, ids: list[int]) -> list[int]:
        if self.prompt_template is not None and self.bos_ids and ids[: len(self.bos_ids)] != self.bos_ids:
            ids = self.bos_ids + ids
        if not ids:  # the first response token needs a position to be predicted from
            start = self.tokenizer.bos_token_id
            ids = [self.tokenizer.eos_token_id if start is None else start]
        return ids

    def _split_end(self, after: str) -> tuple[int, str]:
        """The token that closes a turn, and the text behind it that belongs to the next prompt.

        A special token right behind the response (whitespace aside) closes it, whichever a template
        uses; where there is none, the tokenizer's end of sequence does.
        """
        text = after.lstrip()
        closing = max((token for token in self._specials if text.startswith(token)), key=len, default="")
        opens_next = (
            self.tokenizer.bos_token if self.tokenizer.bos_token != self.tokenizer.eos_token else None
        )
        if not closing or closing == opens_next:
            return self.tokenizer.eos_token_id, after
        return self._specials[closing], text[len(closing) :]

    def _texts_around_responses(self, messages: Sequence[Message], place: str) -> list[str]:
        """The template's text before the first response, between responses, and behind the last."""
        marked: list[dict[str, str]] = []
        marks: list[str] = []
        for message in messages:
            content = message.content
            if message.role == "assistant":
                content = _MARK.format(len(marks))
                marks.append(content)
            marked.append({"role": message.role, "content": content})
        if self.prompt_template is not None:
            text = _apply_prompt_template(self.prompt_template, marked)
        else:
            text = self._apply_chat_template(marked, place)
        texts = []
        for mark in marks:
            before, found, text = text.partition(mark)
            if not found:
                raise UserError(
                    f"The chat template leaves out an assistant turn of the conversation at {place}: "
                    "give the model another `chat_template` or a `prompt_template`."
                )
            texts.append(before)
        return [*texts, text]

    def _apply_chat_template(self, messages: list[dict[str, str]], place: str) -> str:
        from jinja2.exceptions import TemplateError

        # Qwen3-like templates read `enable_thinking`; others ignore it.
        arguments = {"tokenize": False, "enable_thinking": False}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **arguments))
        except TemplateError as error:
            if messages[0]["role"] == "system" and len(messages) > 1:
                _warn_system_once(getattr(self.tokenizer, "name_or_path", ""))
                merged = "\n\n".join(message["content"] for message in messages[:2])
                return self._apply_chat_template([{**messages[1], "content": merged}, *messages[2:]], place)
            raise UserError(
                f"The chat template refuses the conversation at {place} ({error}): correct the record, or "
                "give the model another `chat_template`."
            ) from error

    def _check_prompt_template(self, template: str) -> None:
        try:
            text = template.format(prompt="\ue002", system="")
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"`prompt_template` is no format string with {{prompt}} and optionally {{system}} "
                f"({error!r}): double other braces."
            ) from error
        if "\ue002" not in text:
            raise UserError("`prompt_template` has no {prompt}: put it where the user's text belongs.")


@functools.lru_cache(maxsize=64)
def _warn_system_once(name: str) -> None:
    _log.warning(
        "The chat template of '%s' takes no system message: it goes in front of the user's text.", name
    )


def _apply_prompt_template(template: str, messages: list[dict[str, str]]) -> str:
    system, parts = "", []
    for message in messages:
        if message["role"] == "system":
            system = message["content"]
        elif message["role"] == "user":
            prompt = message["content"]
            if system and "{system}" not in template:
                prompt = f"{system}\n\n{prompt}"
            parts.append(template.format(prompt=prompt, system=system))
            system = ""
        else:
            parts.append(message["content"])
    return "".join(parts)
