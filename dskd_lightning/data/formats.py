"""Records of the usual instruction files as `Example`\\ s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from dskd_lightning.data.examples import Example, Message, Role
from dskd_lightning.errors import UserError
from dskd_lightning.tokenizers import sanitize_text

__all__ = ["DetectedFormat", "Format", "InvalidRecord", "detect_format", "parse_record"]

DetectedFormat = Literal["alpaca", "dolly", "prompt", "messages", "sharegpt"]
Format = Literal["auto", "alpaca", "dolly", "prompt", "messages", "sharegpt"]
"""``auto`` looks at the first record of each file. ``prompt`` takes a ready-made ``prompt`` field
and any response field, also where a file (the papers' Dolly) has ``instruction`` beside it."""

_RESPONSES = ("response", "responses", "output", "outputs", "completion", "answer")
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


class InvalidRecord(UserError):
    """A record that can't be learnt from. ``reason`` is a short phrase to count it under."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def detect_format(record: Mapping[str, Any], source: str) -> DetectedFormat:
    """The format of a file from the keys of its first record.

    Raises:
        UserError: the keys fit no format.
    """
    keys = {key for key, value in record.items() if value is not None}
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if "instruction" in keys:
        return "dolly" if keys & {"context", "response"} and "output" not in keys else "alpaca"
    if "prompt" in keys:
        return "prompt"
    raise UserError(
        f"{source} is in no known format (keys: {', '.join(map(str, record)) or 'none'}): "
        f"name its fields as one of {', '.join(get_args(DetectedFormat))} does, or set `format`."
    )


def parse_record(
    record: Any, format: DetectedFormat, source: str, line: int, *, needs_response: bool = True
) -> Example:
    """The `Example` in ``record``.

    Args:
        record: what one line or row holds.
        format: how its fields are named.
        source: its file, for messages.
        line: its line in that file.
        needs_response: whether an example without response is an error (to predict, it isn't).

    Raises:
        InvalidRecord: a wrong type, an unknown role, or no response where one is needed.
    """
    reader = _Reader(source, line)
    if not isinstance(record, Mapping):
        raise reader.error(f"holds {type(record).__name__} instead of a JSON object", "not an object")
    messages, references = _PARSERS[format](record, reader)
    while messages and messages[-1].role == "assistant" and not messages[-1].content.strip():
        messages = messages[:-1]  # an empty response is a missing one
    if not any(message.role == "user" for message in messages):
        raise reader.error("has no prompt", "no prompt")
    if messages[-1].role != "assistant":
        if needs_response:
            raise reader.error(f"has no response (its fields: {', '.join(map(str, record))})", "no response")
        references = []
    for message in messages[:-1]:
        if message.role == "assistant" and not message.content.strip():
            raise reader.error("has an empty assistant turn", "no response")
    if any(message.role == "system" for message in messages[1:]):
        raise reader.error("has a system message that isn't the first", "misplaced system message")
    return Example(tuple(messages), tuple(references), source, line)


class _Reader:
    """Typed access to a record's fields, with errors that name the place."""

    def __init__(self, source: str, line: int) -> None:
        self.place = f"{source}:{line}"

    def error(self, what: str, reason: str) -> InvalidRecord:
        return InvalidRecord(
            f"The record at {self.place} {what}; correct it, or set `skip_invalid: true` to leave such "
            "records out.",
            reason,
        )

    def text(self, record: Mapping[str, Any], key: str) -> str:
        value = record.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(
                f"has a '{key}' that is {type(value).__name__}, not text", f"'{key}' is not text"
            )
        return sanitize_text(value)

    def references(self, record: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
        """The non-empty responses under the first of ``keys`` that is present."""
        key = next((key for key in keys if record.get(key) is not None), None)
        if key is None:
            return []
        value = record[key]
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise self.error(
                f"has a '{key}' that is neither text nor a list of texts", f"'{key}' is not text"
            )
        return [sanitize_text(text) for text in texts if text.strip()]

    def role(self, value: Any) -> Role:
        if not isinstance(value, str) or value not in _ROLES:
            raise self.error(f"has the unknown role {value!r} (known: {', '.join(_ROLES)})", "unknown role")
        return _ROLES[value]

    def content(self, value: Any) -> str:
        """Text, or OpenAI's list of text parts."""
        if isinstance(value, list) and all(
            isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value
        ):
            value = "".join(part["text"] for part in value)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error("has a message whose content isn't text", "content is not text")
        return sanitize_text(value)


_Parsed = tuple[list[Message], list[str]]


def _single_turn(
    record: Mapping[str, Any], reader: _Reader, prompt: str, responses: tuple[str, ...]
) -> _Parsed:
    system = reader.text(record, "system")
    references = reader.references(record, responses)
    messages = [Message("system", system)] if system.strip() else []
    if prompt.strip():
        messages.append(Message("user", prompt))
    if references:
        messages.append(Message("assistant", references[0]))
    return messages, references


def _instruction(context: str, responses: tuple[str, ...]) -> Callable[[Mapping[str, Any], _Reader], _Parsed]:
    def parse(record: Mapping[str, Any], reader: _Reader) -> _Parsed:
        parts = [reader.text(record, "instruction"), reader.text(record, context)]
        prompt = "\n\n".join(part for part in parts if part.strip())
        return _single_turn(record, reader, prompt, responses)

    return parse


def _prompt(record: Mapping[str, Any], reader: _Reader) -> _Parsed:
    return _single_turn(record, reader, reader.text(record, "prompt"), _RESPONSES)


def _turns(field: str, role: str, content: str) -> Callable[[Mapping[str, Any], _Reader], _Parsed]:
    def parse(record: Mapping[str, Any], reader: _Reader) -> _Parsed:
        turns = record.get(field)
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise reader.error(f"has a '{field}' that isn't a list of messages", f"'{field}' is no list")
        messages = [Message(reader.role(turn.get(role)), reader.content(turn.get(content))) for turn in turns]
        ends = bool(messages) and messages[-1].role == "assistant"
        return messages, [messages[-1].content] if ends else []

    return parse


_PARSERS: dict[str, Callable[[Mapping[str, Any], _Reader], _Parsed]] = {
    "alpaca": _instruction("input", ("output", "outputs", "response", "responses")),
    "dolly": _instruction("context", ("response", "responses")),
    "prompt": _prompt,
    "messages": _turns("messages", "role", "content"),
    "sharegpt": _turns("conversations", "from", "value"),
}
