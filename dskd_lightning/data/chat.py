"""Conversations as the text and tokens of one model, with its responses marked.

Prompt and response pieces are tokenised *separately*, so that the tokens before a response are the ones that
generation will see, and no token straddles the boundary. A SentencePiece tokenizer with a prefix
space thus starts every response with its ``▁`` token, which stands for no byte of the response
and which decoding removes: the form in which such a model answers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress
from typing import Any, Literal

from dskd_lightning.alignment.byte_spans import ByteSpans, batch_byte_spans, token_byte_spans
from dskd_lightning.alignment.token_bytes import token_bytes
from dskd_lightning.data.examples import Example, Message
from dskd_lightning.data.templates import ChatTemplate, any_of
from dskd_lightning.errors import UserError
from dskd_lightning.models.loaded import Loaded
from dskd_lightning.models.spec import ModelSpec
from dskd_lightning.tokenizers import encoded, tokenizer_fingerprint

__all__ = ["ChatRenderer", "Layout", "Learn", "RenderedConversation", "RenderedTurn"]

Learn = Literal["assistant", "last", "everything"]
"""Which texts of a conversation are learnt: every assistant turn, the last one, or every message's.
What a template writes around them is not, the token that closes a text excepted."""


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


@dataclass(frozen=True, slots=True)
class _Text:
    """What is tokenised by itself; special tokens' strings in it are tokens where it is literal."""

    text: str
    literal: bool


@dataclass(frozen=True, slots=True)
class _Turn:
    """Texts and token ids of a prompt, the response behind it and what closes that."""

    prompt: tuple[_Text | int, ...]
    response: _Text
    end: tuple[int, ...]
    learnt: bool

    @property
    def texts(self) -> list[_Text]:
        """In the order in which they are read."""
        return [*(piece for piece in self.prompt if isinstance(piece, _Text)), self.response]


Layout = tuple[_Turn, ...]
"""All turns of one example as texts, learnt or not."""


class ChatRenderer:
    """Renders conversations for one model.

    Args:
        tokenizer: the model's fast tokenizer; its chat template is used unless ``prompt_template``.
        prompt_template: a format string with ``{prompt}`` and optionally ``{system}``, applied to
            each user turn (the system text to the first). A BOS token is put in front where the
            tokenizer adds one by itself.
        template_options: further arguments of the chat template, such as ``enable_thinking``.
        special_tokens_in_text: read special tokens' strings inside messages as those tokens; else
            they are plain text.
        learn: which texts are learnt.
        system: a teacher's own system message, see `Example.for_teacher`.

    Raises:
        UserError: a ``prompt_template`` without ``{prompt}``, no token that could end a response, or a
            ``system`` of one's own where the student learns the record's.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        special_tokens_in_text: bool = False,
        learn: Learn = "assistant",
        system: str | None = None,
    ) -> None:
        self.tokenizer, self.learn, self.system = tokenizer, learn, system
        if system is not None and learn == "everything":
            raise UserError(
                "A teacher's own `system` can't be learnt by the student: drop it, or `learn: everything`."
            )
        self.prompt_template = prompt_template
        self.special_tokens_in_text = special_tokens_in_text
        self.template = ChatTemplate(tokenizer, prompt_template, template_options)
        self.bos_ids = self._leading_ids()
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if prompt_template is not None:
            self._check_prompt_template(prompt_template)
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer '{name}' has no end-of-sequence token: set `eos_token` in its "
                "tokenizer_config.json."
            )
        self._specials = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        self._closing = any_of(tuple(filter(None, self._added)))

    @classmethod
    def from_spec(
        cls,
        tokenizer: Any,
        spec: ModelSpec | Loaded | None,
        special_tokens_in_text: bool = False,
        learn: Learn = "assistant",
    ) -> ChatRenderer:
        """The renderer of the model that ``spec`` describes."""
        if spec is None:
            return cls(tokenizer, special_tokens_in_text=special_tokens_in_text, learn=learn)
        return cls(
            tokenizer, spec.prompt_template, spec.template_options, special_tokens_in_text, learn,
            getattr(spec, "system", None),
        )  # fmt: skip

    @functools.cached_property
    def tokenizer_fingerprint(self) -> str:
        """That of the tokenizer, which takes a while where the vocabulary is large."""
        return tokenizer_fingerprint(self.tokenizer)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for renderers that give every conversation the same tokens, and so the same tokens of a
        response, whatever ``system`` is in front of it."""
        template = self.prompt_template if self.prompt_template is not None else self.tokenizer.chat_template
        parts = [
            self.tokenizer_fingerprint,
            template,
            self.tokenizer.special_tokens_map,
            self.bos_ids,
            self.template.options,
            self.special_tokens_in_text,
            *([] if self.learn == "assistant" else [self.learn]),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def render(self, example: Example) -> RenderedConversation:
        """Tokens of ``example``, which ends with a response; learnt texts lose their outer whitespace.

        A response that isn't to be learnt belongs to the prompt of the next. A document is learnt as it
        is, behind the token that starts a text, and ended by the tokenizer's end of sequence.

        Raises:
            UserError: there is no template, or it refuses the conversation.
        """
        return self.tokenized([self.laid_out(example)])[0]

    def laid_out(self, example: Example) -> Layout:
        """`render` up to the tokenizer, which `tokenized` then calls once for many examples.

        Raises:
            UserError: as `render`.
        """
        if example.is_document:
            text = _Text(example.messages[0].content, self.special_tokens_in_text)
            return (_Turn(tuple(self.bos_ids), text, (self.tokenizer.eos_token_id,), True),)
        example = self.template.spelled_out(example)
        everything = self.learn == "everything"
        marked = [m for m in example.messages if m.role == "assistant" or (everything and not m.empty)]
        last = max((i for i, m in enumerate(marked) if m.learnt), default=0)
        texts, written = self._around(example.messages, example.tools, example.place, everything)
        turns = []
        before = texts[0]
        for index, (message, after) in enumerate(zip(marked, texts[1:], strict=True)):
            closing, before_next = self._split_end(after)
            end = (closing,) if message.role == "assistant" or before_next != after else ()
            literal = message.special or self.special_tokens_in_text
            learnt = message.learnt and (self.learn != "last" or index == last)
            response = _Text(message.content.strip(), literal)
            turns.append(_Turn(self._prompt(before, written), response, end, learnt))
            before = before_next
        return tuple(turns)

    def tokenized(self, layouts: Sequence[Layout]) -> list[RenderedConversation]:
        """The conversations of ``layouts``."""
        texts, learnt = list[_Text](), list[bool]()
        for turn in chain.from_iterable(layouts):
            texts += turn.texts
            learnt += [False] * (len(turn.texts) - 1) + [turn.learnt]
        ids = self._all_ids(texts)
        spans = batch_byte_spans(
            self.tokenizer,
            [text.text for text in compress(texts, learnt)],
            list(compress(ids, learnt)),
            end_ids=(),
        )
        of_text, of_response = iter(ids), iter(spans)
        return [self._assembled(layout, of_text, of_response) for layout in layouts]

    def _assembled(
        self, layout: Layout, ids: Iterator[list[int]], spans_of: Iterator[ByteSpans]
    ) -> RenderedConversation:
        turns, prompt_ids = [], list[int]()
        for index, turn in enumerate(layout):
            for piece in turn.prompt:
                prompt_ids += next(ids) if isinstance(piece, _Text) else [piece]
            if index == 0:
                prompt_ids = self._with_start(prompt_ids)
            response_ids, end = next(ids), list(turn.end)
            if turn.learnt:
                spans = next(spans_of)
                turns.append(RenderedTurn(prompt_ids, response_ids + end, spans.with_end() if end else spans))
                prompt_ids = []
            else:
                prompt_ids = [*prompt_ids, *response_ids, *end]
        return RenderedConversation(tuple(turns))

    def generation_prompt(
        self, messages: Sequence[Message], place: str = "", *, tools: str = "", reasoning: bool | None = None
    ) -> list[int]:
        """Token ids after which the model must answer; the same as those a response was trained after.

        Args:
            messages: the conversation so far.
            place: its record, for messages to the user.
            tools: JSON list of the functions that the model may call.
            reasoning: whether the answer starts with reasoning; None for what the template's
                ``enable_thinking`` says.
        """
        turns = self.unanswered(messages, place, tools=tools, reasoning=reasoning).turns
        return [token for turn in turns for token in (*turn.prompt_ids, *turn.response_ids)]

    def unanswered(
        self, messages: Sequence[Message], place: str = "", *, tools: str = "", reasoning: bool | None = None
    ) -> RenderedConversation:
        """The turns of `generation_prompt`; the last one's response has no tokens."""
        example = Example(self._with_answer(messages, reasoning), source=place, tools=tools)
        *past, last = self.render(example).turns
        return RenderedConversation((*past, replace(last, response_ids=[], spans=last.spans.window(0, 0)[1])))

    def response_turn(self, text: str, *, ended: bool) -> tuple[list[int], ByteSpans]:
        """The tokens of a response as it is, and their spans.

        Args:
            text: the response; special tokens' strings in it are text.
            ended: whether the token that closes a turn follows.
        """
        ids = self._plain_ids(text)
        spans = token_byte_spans(self.tokenizer, text, ids, end_ids=())
        return ([*ids, self.end_id], spans.with_end()) if ended else (ids, spans)

    @functools.cached_property
    def end_id(self) -> int:
        """The token that closes the answer to a question."""
        texts, _ = self._around((Message("user", "?"), Message("assistant", "?")), "", "a question", False)
        closing, _ = self._split_end(texts[-1])
        return int(self.tokenizer.eos_token_id if closing is None else closing)

    def _with_answer(self, messages: Sequence[Message], reasoning: bool | None) -> tuple[Message, ...]:
        if reasoning is None:
            reasoning = bool(self.template.options["enable_thinking"])
        answer = "<think>\n?\n</think>\n\n?" if reasoning else "?"
        return (*messages, Message("assistant", answer))

    def _around(
        self, messages: Sequence[Message], tools: str, place: str, everything: bool = False
    ) -> tuple[list[str], dict[str, str]]:
        plain = () if self.special_tokens_in_text else tuple(self._specials)
        return self.template.around_responses(messages, tools, place, plain, everything)

    def _all_ids(self, texts: Sequence[_Text]) -> list[list[int]]:
        """Tokens of each text; in one that isn't literal special tokens' strings are text."""
        hidden = [not t.literal and any(map(t.text.__contains__, self._specials)) for t in texts]
        usual = [text.text for text, is_hidden in zip(texts, hidden, strict=True) if not is_hidden]
        ids = iter(encoded(self._tracer, usual, threads=False))
        if not any(hidden):
            return list(ids)
        plain = iter(encoded(self._plain, [text.text for text in compress(texts, hidden)], threads=False))
        return [next(plain if is_hidden else ids) for is_hidden in hidden]

    def _plain_ids(self, text: str) -> list[int]:
        return self._all_ids([_Text(text, False)])[0]

    @property
    def _tracer(self) -> Any:
        return token_bytes(self.tokenizer).tracer

    @functools.cached_property
    def _plain(self) -> Any:
        from tokenizers import Tokenizer

        plain = Tokenizer.from_str(self._tracer.to_str())
        plain.encode_special_tokens = True
        return plain

    def _prompt(self, text: str, written: Mapping[str, str]) -> tuple[_Text | int, ...]:
        """Template and user text; what ``written`` marks is text, whatever it looks like."""
        if not any(mark in text for mark in written):
            return (_Text(text, True),)
        pieces, position = list[_Text | int](), 0
        for special in any_of(tuple(self._specials)).finditer(text):
            pieces.append(_Text(_restore(text[position : special.start()], written), False))
            pieces.append(self._specials[special[0]])
            position = special.end()
        pieces.append(_Text(_restore(text[position:], written), False))
        return tuple(pieces)

    def _leading_ids(self) -> list[int]:
        """What the tokenizer puts in front of every text by itself: usually BOS or nothing."""
        (plain,), full = encoded(self._tracer, ["a"], threads=False), self.tokenizer("a")["input_ids"]
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

        An added token (marked as special or not) right behind the response (whitespace aside)
        closes it, whichever a template uses; where there is none, the tokenizer's end of sequence does,
        and the text stays as it is.
        """
        text = after.lstrip()
        found = self._closing.match(text)
        closing = found[0] if found else ""
        opens_next = (
            self.tokenizer.bos_token if self.tokenizer.bos_token != self.tokenizer.eos_token else None
        )
        if not closing or closing == opens_next:
            return self.tokenizer.eos_token_id, after
        return self._added[closing], text[len(closing) :]

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


def _restore(text: str, written: Mapping[str, str]) -> str:
    for mark, original in written.items():
        text = text.replace(mark, original)
    return text
