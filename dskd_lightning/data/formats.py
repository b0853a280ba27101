"""Records of the usual instruction files as `Example`\\ s."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from dskd_lightning.data.examples import Example, InvalidRecord, Message
from dskd_lightning.data.fields import RecordReader
from dskd_lightning.errors import UserError

__all__ = ["DetectedFormat", "Format", "InvalidRecord", "detect_format", "parse_record"]

DetectedFormat = Literal["alpaca", "dolly", "prompt", "messages", "sharegpt", "text"]
Format = Literal["auto", "alpaca", "dolly", "prompt", "messages", "sharegpt", "text"]
"""``auto`` looks at the first record of each file. ``prompt`` takes a ready-made ``prompt`` field
and any response field, also where a file (the papers' Dolly) has ``instruction`` beside it. ``text``
are whole documents, learnt in windows without a template."""

_RESPONSES = ("response", "responses", "output", "outputs", "completion", "chosen", "answer")
_DOCUMENTS = ("text", "content")
_CONVERSATIONS = ("messages", "conversations", "conversation")


def detect_format(record: Mapping[str, Any], source: str) -> DetectedFormat:
    """The format of a file from the keys of its first record.

    Raises:
        UserError: the keys fit no format.
    """
    keys = {key for key, value in record.items() if value is not None}
    if "messages" in keys:
        return "messages"
    if keys & {"conversations", "conversation"}:
        return "sharegpt"
    if "instruction" in keys:
        return "dolly" if keys & {"context", "response"} and "output" not in keys else "alpaca"
    if "prompt" in keys:
        return "prompt"
    if _is_conversation(record.get("chosen")):
        return "messages"
    if keys & set(_DOCUMENTS):
        return "text"
    raise UserError(
        f"{source} is in no known format (keys: {', '.join(map(str, record)) or 'none'}): "
        f"name its fields as one of {', '.join(get_args(DetectedFormat))} does, or set `format`."
    )


def parse_record(
    record: Any,
    format: DetectedFormat,
    source: str,
    line: int,
    *,
    needs_response: bool = True,
    unused: Counter[str] | None = None,
    teachers: Sequence[str] = (),
) -> Example:
    """The `Example` in ``record``.

    Args:
        record: what one line or row holds.
        format: how its fields are named.
        source: its file, for messages.
        line: its line in that file.
        needs_response: whether an example without response is an error (to predict, it isn't).
        unused: counts the fields that hold something and say nothing to us.
        teachers: their names; where there are none, a field ``teacher`` says nothing to us either.

    Raises:
        InvalidRecord: a wrong type, an unknown role or teacher, or no response where one is needed.
    """
    reader = RecordReader(record, source, line)
    try:
        teacher = _teacher(reader, teachers)
        return replace(_parsed(reader, format, needs_response, unused), teacher=teacher)
    except RecursionError as error:
        raise reader.error("is nested too deep", "nested too deep") from error


def _parsed(
    reader: RecordReader, format: DetectedFormat, needs_response: bool, unused: Counter[str] | None
) -> Example:
    record = reader.record
    if format == "text":
        text = reader.text(reader.first(_DOCUMENTS) or _DOCUMENTS[0])
        if not text.strip():
            raise reader.error(f"has no text (its fields: {', '.join(map(str, record))})", "no text")
        if not needs_response:
            raise reader.error("is a document and asks nothing: give a prompt under 'prompt'", "no prompt")
        if unused is not None:
            unused.update(reader.unused)
        return Example((Message("assistant", text),), (), *reader.at, fields=reader.rest)
    messages, references = _PARSERS[format](reader)
    while messages and messages[-1].role == "assistant" and messages[-1].empty:
        messages = messages[:-1]  # an empty response is a missing one
    if not any(message.role == "user" for message in messages):
        raise reader.error("has no prompt", "no prompt")
    if messages[-1].role != "assistant":
        if needs_response:
            raise reader.error(f"has no response (its fields: {', '.join(map(str, record))})", "no response")
        references = []
    else:
        content = reader.reasoned(messages[-1].content)
        references = [content if text == messages[-1].content else text for text in references]
        messages = [*messages[:-1], replace(messages[-1], content=content)]
    for message in messages[:-1]:
        if message.role == "assistant" and message.empty:
            raise reader.error("has an empty assistant turn", "no response")
    if any(message.role == "system" for message in messages[1:]):
        raise reader.error("has a system message that isn't the first", "misplaced system message")
    if needs_response and not any(m.role == "assistant" and m.learnt for m in messages):
        raise reader.error("has no response to learn: every weight is 0", "nothing to learn")
    tools = reader.tools()
    own = _teacher_messages(reader)
    if own:  # they stand in front of one response
        messages = [*(replace(m, learnt=False) for m in messages[:-1]), messages[-1]]
        if needs_response and not messages[-1].learnt:
            raise reader.error("has 'teacher_messages' and no last response to learn", "nothing to learn")
    if unused is not None:
        unused.update(reader.unused)
    return Example(tuple(messages), tuple(references), *reader.at, tools, reader.rest, own)


def _teacher(reader: RecordReader, known: Sequence[str]) -> str:
    """The only teacher that answers for the record, or nothing."""
    named = reader.get("teacher") if known else None
    if named is None or named == "":
        return ""
    if not isinstance(named, str) or named not in known:
        raise reader.error(
            f"names the teacher {named!r}, which isn't among those that have a `name` ({', '.join(known)})",
            "unknown teacher",
        )
    return named


def _teacher_messages(reader: RecordReader) -> tuple[Message, ...]:
    """What teachers read in front of the response instead."""
    if not reader.get("teacher_messages"):
        return ()
    messages = [replace(message, learnt=False) for message in reader.messages("teacher_messages")]
    fault = None
    if messages[-1].role == "assistant":
        fault = "end with an assistant turn, though the record's own response follows them"
    elif not any(message.role == "user" for message in messages):
        fault = "hold no user message"
    elif any(message.role == "system" for message in messages[1:]):
        fault = "hold a system message that isn't the first"
    elif any(message.role == "assistant" and message.empty for message in messages):
        fault = "hold an empty assistant turn"
    if fault is not None:
        raise reader.error(f"has 'teacher_messages' that {fault}", "bad 'teacher_messages'")
    return tuple(messages)


_Parsed = tuple[list[Message], list[str]]


def _instruction(reader: RecordReader) -> _Parsed:
    parts = [reader.text(key) for key in ("instruction", "context", "input")]
    return _single_turn(reader, "\n\n".join(part for part in parts if part.strip()))


def _prompt(reader: RecordReader) -> _Parsed:
    response = reader.first(_RESPONSES)
    if response is not None and _is_conversation(reader.record[response]):
        messages = reader.messages(response)
        prompt = reader.record.get("prompt")
        if _is_conversation(prompt):
            messages = reader.messages("prompt") + messages
        elif messages[0].role == "assistant":
            messages.insert(0, Message("user", reader.text("prompt")))
        elif any(message.content == prompt for message in messages):
            reader.get("prompt")  # a preference file repeats it
        return _conversation(reader, messages)
    if _is_conversation(reader.record.get("prompt")):
        references = reader.references(_RESPONSES)
        answer = [Message("assistant", text) for text in references[:1]]
        messages, _ = _conversation(reader, reader.messages("prompt") + answer)
        return messages, references
    return _single_turn(reader, reader.text("prompt"))


def _single_turn(reader: RecordReader, prompt: str) -> _Parsed:
    references = reader.references(_RESPONSES)
    messages = reader.history()
    if prompt.strip():
        messages.append(Message("user", prompt))
    if references:
        messages.append(Message("assistant", references[0]))
    return _conversation(reader, messages)[0], references


def _turns(reader: RecordReader) -> _Parsed:
    key = reader.first(_CONVERSATIONS) or reader.first(("chosen",)) or _CONVERSATIONS[0]
    return _conversation(reader, reader.messages(key))


def _conversation(reader: RecordReader, messages: list[Message]) -> _Parsed:
    """``messages`` behind the record's own ``system``, which gives way to a system message of theirs."""
    if not (messages and messages[0].role == "system") and (system := reader.text("system")).strip():
        messages = [Message("system", system), *messages]
    elif messages and messages[0].content == reader.record.get("system"):
        reader.get("system")
    ends = bool(messages) and messages[-1].role == "assistant"
    return messages, [messages[-1].content] if ends else []


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


_PARSERS: dict[str, Callable[[RecordReader], _Parsed]] = {
    "alpaca": _instruction,
    "dolly": _instruction,
    "prompt": _prompt,
    "messages": _turns,
    "sharegpt": _turns,
}
