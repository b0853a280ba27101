"""What a model's template writes around the responses of a conversation.

The conversation is rendered once with a mark for each assistant turn; what lies between the marks
is the template's text, and no template needs a ``{% generation %}`` tag. Marks are made of
private-use characters that occur nowhere in the conversation.
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from dskd_lightning.data.examples import Example, InvalidRecord, Message
from dskd_lightning.errors import UserError

__all__ = ["ChatTemplate", "any_of", "split_reasoning"]

_log = logging.getLogger(__name__)
_REASONING = re.compile(r"(<think>\s*)(.*?)(\s*</think>\s*)(\S.*)", re.DOTALL)
_OPENED = re.compile(r"<think>\s*(</think>\s*)?$")
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_TODAY = datetime.datetime(2024, 7, 26)  # the date that Llama's templates fall back to


def split_reasoning(response: str) -> tuple[str, str]:
    """``<think>...</think>`` in front of a response, tags and whitespace included, and what follows."""
    found = _REASONING.fullmatch(response)
    return (response[: found.start(4)], found[4]) if found else ("", response)


class ChatTemplate:
    """One model's template.

    Args:
        tokenizer: holds the chat template.
        prompt_template: a format string that is used instead.
        options: further arguments of the chat template, such as ``enable_thinking``.
    """

    def __init__(
        self, tokenizer: Any, prompt_template: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.prompt_template = tokenizer, prompt_template
        # Qwen3-like templates read `enable_thinking`; others ignore it.
        self.options = {"enable_thinking": False, **(options or {})}
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        self._shown_of: dict[tuple[Any, ...], frozenset[int]] = {}

    def around_responses(
        self,
        messages: Sequence[Message],
        tools: str,
        place: str,
        plain: Sequence[str] = (),
        everything: bool = False,
    ) -> tuple[list[str], dict[str, str]]:
        """The text before the first response, between responses, and behind the last.

        Args:
            messages: the conversation, its tool calls spelled out.
            tools: JSON list of the functions that the model may call, or nothing.
            place: the record, for messages to the user.
            plain: strings that stand for text where a user wrote them. They are left out of the
                result, which holds a mark for each instead.
            everything: take every message that says something for a response.

        Returns:
            The texts, and what each mark in them stands for.
        """
        mark, *digits, inner, outer, special = list(
            _absent([*(m.content for m in messages), tools, *plain], 14)
        )
        found = any_of(tuple(plain)) if plain else None

        def written_as(number: int) -> str:
            return "".join(digits[int(digit)] for digit in str(number))

        marked, written = [], dict[str, str]()
        patterns: list[tuple[str, list[re.Pattern[str]]]] = []
        for message in messages:
            content = message.content
            name = mark + written_as(len(patterns))
            if message.role == "assistant":
                content, pattern = _mark_response(
                    content.strip(), f"{name}{inner}{mark}", f"{name}{outer}{mark}"
                )
                patterns.append(("an assistant turn", pattern))
            elif everything and not message.empty:
                content = f"{name}{outer}{mark}"
                patterns.append((f"a {message.role} message", [re.compile(content)]))
            elif found:

                def hide(match: re.Match[str]) -> str:
                    key = f"{mark}{special}{written_as(plain.index(match[0]))}{mark}"
                    written[key] = match[0]
                    return key

                content = found.sub(hide, content)
            marked.append({"role": message.role, "content": content, **_extra(message)})
        text = self.apply(marked, tools, place)
        texts = []
        for what, pattern in patterns:
            hit = next(filter(None, (option.search(text) for option in pattern)), None)
            if hit is None:
                raise _left_out(what, place, everything)
            before = text[: hit.start()]
            texts.append(_OPENED.sub("", before) if len(pattern) > 1 else before)
            text = text[hit.end() :]
        return [*texts, text], written

    def apply(self, messages: list[dict[str, Any]], tools: str, place: str) -> str:
        """The template's text of ``messages``, a system message in front of the user's if it takes none."""
        if self.prompt_template is not None:
            return _apply_prompt_template(self.prompt_template, messages)
        if not self.tokenizer.chat_template:
            raise UserError(
                f"The tokenizer '{self.name}' has no chat template: set the model's `prompt_template` (for "
                r'example "### Instruction:\n{prompt}\n\n### Response:\n") or `chat_template`.'
            )
        system = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
        try:
            text = self._rendered(messages, tools)
            if system and not (system in text and 0 in self._shown(messages, tools)):
                raise ValueError("it leaves out the system message")
        except Exception as error:  # templates are programs, and raise anything
            if system and len(messages) > 1 and messages[1]["role"] == "user":
                merged = "\n\n".join(message["content"] for message in messages[:2])
                text = self.apply([{**messages[1], "content": merged}, *messages[2:]], tools, place)
                _warn_once(
                    f"The chat template of '{self.name}' takes no system message: it goes in front of the "
                    "user's text."
                )
                return text
            reason = f"{error}" if str(error) else type(error).__name__
            raise InvalidRecord(
                f"The chat template refuses the conversation at {place} ({reason}): correct the record, or "
                "give the model another `chat_template`.",
                "refused by the chat template",
            ) from error
        shown = self._shown(messages, tools)
        for index, message in enumerate(messages):
            if message["role"] in ("user", "tool") and not (
                index in shown and any(form in text for form in _forms(message["content"].strip()))
            ):
                raise InvalidRecord(
                    f"The chat template leaves out a {message['role']} message of the conversation at "
                    f"{place}: give the model another `chat_template`.",
                    "left out by the chat template",
                )
        return text

    def _shown(self, messages: list[dict[str, Any]], tools: str) -> frozenset[int]:
        """Which messages of a conversation like this the template shows; their text may stand elsewhere too.

        All of them where the template refuses to be asked, which it does by other texts in their place.
        """
        case = (tuple((message["role"], *sorted(message)) for message in messages), bool(tools))
        if case not in self._shown_of:
            mark = _absent([tools, *(message["content"] for message in messages)], 1)
            asked = {i: f"{mark}{i}{mark}" for i, m in enumerate(messages) if m["role"] != "assistant"}
            marked = [{**m, "content": asked.get(i, m["content"])} for i, m in enumerate(messages)]
            try:
                text = self._rendered(marked, tools)
            except Exception:
                text = "".join(asked.values())
            self._shown_of[case] = frozenset(i for i, name in asked.items() if name in text)
        return self._shown_of[case]

    def spelled_out(self, example: Example) -> Example:
        """``example`` with its tool calls as the text that this template writes for them."""
        if not any(m.role == "assistant" and "tool_calls" in _extra(m) for m in example.messages):
            return example
        messages = list(example.messages)
        for index, message in enumerate(messages):
            if message.role == "assistant" and "tool_calls" in _extra(message):
                text = self._call_text(messages[:index], message, example)
                messages[index] = replace(message, content=text, extra="", special=True)
        ends = example.response is not None
        references = (messages[-1].content,) if ends and len(example.references) < 2 else example.references
        return replace(example, messages=tuple(messages), references=references)

    def _call_text(self, before: list[Message], message: Message, example: Example) -> str:
        reasoning, content = split_reasoning(message.content.strip())
        calls = _extra(message)["tool_calls"]
        if self.prompt_template is None:
            mark = _absent([*(m.content for m in before), content, example.tools], 1)
            past = [{"role": m.role, "content": m.content, **_extra(m)} for m in before]
            turn = {"role": "assistant", "content": mark}
            start, _, end = self.apply([*past, turn], example.tools, example.place).partition(mark)
            turn = {"role": "assistant", "content": content, "tool_calls": calls}
            whole = self.apply([*past, turn], example.tools, example.place)
            text = whole.removeprefix(start).removesuffix(end)
            if len(text) == len(whole) - len(start) - len(end) and text.strip() != content:
                return reasoning + text.strip()
        _warn_once(
            f"The template of '{self.name}' writes no tool calls: they are written as <tool_call> with JSON."
        )
        functions = [call.get("function", call) for call in calls]
        texts = [f"<tool_call>\n{json.dumps(f, ensure_ascii=False)}\n</tool_call>" for f in functions]
        return reasoning + "\n".join([content, *texts] if content else texts)

    @functools.cached_property
    def drops_reasoning(self) -> bool:
        """Whether the reasoning of answers before the last question is left out."""
        if self.prompt_template is not None:
            return False
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<think>\ndskdprobe\n</think>\n\nb"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ]
        try:
            return "dskdprobe" not in self._rendered(messages, "")
        except Exception:  # what it refuses it will refuse again, with a record to name
            return False

    def _rendered(self, messages: list[dict[str, Any]], tools: str) -> str:
        functions = json.loads(tools) if tools else None
        template = self.tokenizer.get_chat_template(tools=functions)
        dateless = _dateless(template)
        if dateless != template:  # prepared data and the prompts of another day must agree
            _warn_once(
                f"The chat template of '{self.name}' may write today's date: it is fixed at "
                f"{_TODAY:%Y-%m-%d}; to choose, give `template_options` what the template reads "
                "(`date_string` for Llama's)."
            )
        text = str(
            self.tokenizer.apply_chat_template(
                messages, tools=functions, chat_template=dateless, tokenize=False, **self.options
            )
        )
        if functions and not all(_name(function) in text for function in functions):
            _warn_once(f"The chat template of '{self.name}' shows the model no `tools`.")
        return text


def _mark_response(response: str, inner: str, outer: str) -> tuple[str, list[re.Pattern[str]]]:
    """A stand-in for ``response`` with its reasoning where templates look for it, and how to find it."""
    parts = _REASONING.fullmatch(response)
    if parts is None:
        return outer, [re.compile(outer)]
    reasoning = inner if parts[2] else ""
    options = [rf"<think>\s*{reasoning}\s*</think>\s*{outer}", outer]
    if reasoning:
        options.insert(1, rf"{inner}.*?{outer}")
    found = [re.compile(option, re.DOTALL) for option in options]
    # No space behind the reasoning: a template that drops what is in front of it would keep it in the prompt.
    return f"{parts[1]}{reasoning}{parts[3].rstrip()}{outer}", found


def _left_out(what: str, place: str, everything: bool) -> InvalidRecord:
    moved, setting = (", or moves one", ", or set `learn: assistant`") if everything else ("", "")
    return InvalidRecord(
        f"The chat template leaves out {what} of the conversation at {place}{moved}: give the model another "
        f"`chat_template` or a `prompt_template`{setting}.",
        "left out by the chat template",
    )


def _forms(content: str) -> tuple[str, str]:
    """How a template may write ``content``: as it is, or within JSON."""
    return content, json.dumps(content, ensure_ascii=False)[1:-1]


def _absent(texts: Sequence[str], count: int) -> str:
    """So many different private-use characters that are in none of ``texts``."""
    whole = "\n".join(texts)
    return "".join(islice((char for char in map(chr, range(0xE000, 0xF900)) if char not in whole), count))


@functools.lru_cache(maxsize=64)
def any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the longest of ``texts`` that starts at a place."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _extra(message: Message) -> dict[str, Any]:
    extra: dict[str, Any] = json.loads(message.extra) if message.extra else {}
    return extra


def _name(function: dict[str, Any]) -> str:
    return str(function.get("function", function).get("name", ""))


@functools.lru_cache(maxsize=64)
def _dateless(template: str) -> str:
    return _DATE.sub(lambda call: repr(_TODAY.strftime(call[2])), template)


@functools.lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    _log.warning(text)


def _apply_prompt_template(template: str, messages: list[dict[str, Any]]) -> str:
    system, parts = "", []
    for message in messages:
        if message["role"] == "system":
            system = message["content"]
        elif message["role"] in ("user", "tool"):
            prompt = message["content"]
            if system and "{system}" not in template:
                prompt = f"{system}\n\n{prompt}"
            parts.append(template.format(prompt=prompt, system=system))
            system = ""
        else:
            parts.append(message["content"])
    return "".join(parts)
