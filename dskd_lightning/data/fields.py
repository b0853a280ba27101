"""Typed access to the fields of one raw record, which remembers what was used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dskd_lightning.data.examples import InvalidRecord, Message, Role
from dskd_lightning.tokenizers import sanitize_text

__all__ = ["RecordReader"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")
_LEARNT_KEYS = ("train", "loss")  # axolotl's and ms-swift's
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")
_PROVENANCE = (
    "finished",
    "same_as",
    "choices",
)  # of generated responses; of prompts that ask the same, or leave some answers: not to be learnt


class RecordReader:
    """Fields of ``record`` as text, references and messages; errors name the place.

    Args:
        record: one JSON object or row.
        source: its file.
        line: its line there.
    """

    def __init__(self, record: Any, source: str, line: int) -> None:
        self.at, self.place = (source, line), f"{source}:{line}"
        if not isinstance(record, Mapping):
            raise self.error(f"holds {type(record).__name__} instead of a JSON object", "not an object")
        self.record: Mapping[str, Any] = record
        self._used: set[str] = set(_PROVENANCE)
        self._unused_in_messages: set[str] = set()

    def error(self, what: str, reason: str) -> InvalidRecord:
        return InvalidRecord(
            f"The record at {self.place} {what}; correct it, or set `skip_invalid: true` to leave such "
            "records out.",
            reason,
        )

    @property
    def unused(self) -> list[str]:
        """Names of fields that hold something and were not read; those of messages as ``messages.NAME``."""
        own = [str(key) for key, value in self.record.items() if key not in self._used and _holds(value)]
        return own + sorted(self._unused_in_messages)

    @property
    def rest(self) -> str:
        """JSON object of the record's own fields that hold something and were not read, or nothing."""
        read = self._used - set(_PROVENANCE)
        kept = {str(key): value for key, value in self.record.items() if key not in read and _holds(value)}
        return json.dumps(kept, ensure_ascii=False, default=str) if kept else ""

    def get(self, key: str) -> Any:
        """The raw value, marked as used."""
        self._used.add(key)
        return self.record.get(key)

    def first(self, keys: Sequence[str]) -> str | None:
        """The first of ``keys`` that holds something, else the first that is there at all."""
        present = [key for key in keys if self.record.get(key) is not None]
        return next((key for key in present if _holds(self.record[key])), present[0] if present else None)

    def text(self, key: str) -> str:
        value = self.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(
                f"has a '{key}' that is {type(value).__name__}, not text", f"'{key}' is not text"
            )
        return sanitize_text(value)

    def references(self, keys: Sequence[str]) -> list[str]:
        """The non-empty responses under the first of ``keys`` that holds any."""
        key = self.first(keys)
        if key is None:
            return []
        value = self.get(key)
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise self.error(
                f"has a '{key}' that is neither text nor a list of texts", f"'{key}' is not text"
            )
        return [sanitize_text(text) for text in texts if text.strip()]

    def messages(self, key: str) -> list[Message]:
        """The conversation under ``key``, whichever way its messages name role and content."""
        turns = self.get(key)
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise self.error(f"has a '{key}' that isn't a list of messages", f"'{key}' is no list")
        return [self._message(key, turn) for turn in turns]

    def reasoned(self, response: str) -> str:
        """A response behind the record's own reasoning, unless it holds its own."""
        key = _reasoning_key(self.record, response)
        if key is None or not isinstance(self.record[key], str):
            return response
        return _reasoned(self.text(key), response)

    def history(self) -> list[Message]:
        """Earlier turns: ``history``, a list of pairs of prompt and response."""
        pairs = self.get("history") or []
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
            for pair in pairs
        ):
            raise self.error(
                "has a 'history' that isn't a list of [prompt, response] pairs", "'history' is no list"
            )
        roles: tuple[Role, Role] = ("user", "assistant")
        return [
            Message(role, sanitize_text(text))
            for pair in pairs
            for role, text in zip(roles, pair, strict=True)
        ]

    def _message(self, field: str, turn: Mapping[str, Any]) -> Message:
        role_key = next((key for key in _ROLE_KEYS if turn.get(key) is not None), None)
        if role_key is None:
            raise self.error(
                f"has a message without a role (its keys: {', '.join(map(str, turn)) or 'none'}; the role "
                f"belongs under {' or '.join(map(repr, _ROLE_KEYS))})",
                "no role",
            )
        role = turn[role_key]
        if not isinstance(role, str) or role not in _ROLES:
            raise self.error(f"has the unknown role {role!r} (known: {', '.join(_ROLES)})", "unknown role")
        content_key = next((key for key in _CONTENT_KEYS if turn.get(key) is not None), None)
        content = self._content(None if content_key is None else turn[content_key])
        used = {role_key, content_key}
        extra: dict[str, Any] = {}
        learnt = True
        if _ROLES[role] == "assistant":
            calls = turn.get("tool_calls") or []
            if role in _CALLS:
                calls, content = self._parsed(content, f"a {role}"), ""
            if calls:
                extra["tool_calls"] = self._tool_calls(calls)
            if (weight := turn.get("weight")) is not None:
                if weight not in (0, 1):
                    raise self.error(f"has the message weight {weight!r}, neither 0 nor 1", "message weight")
                learnt = bool(weight)
            switches = {key for key in _LEARNT_KEYS if isinstance(turn.get(key), bool)}
            learnt = learnt and all(turn[key] for key in switches)
            reasoning = _reasoning_key(turn, content)
            if reasoning is not None:
                content = _reasoned(self._content(turn[reasoning]), content)
                used.add(reasoning)
            used |= {"tool_calls", "weight", *switches}
        elif _ROLES[role] == "tool":
            extra = {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
            used |= extra.keys()
        self._unused_in_messages |= {
            f"{field}.{key}" for key, value in turn.items() if key not in used and _holds(value)
        }
        return Message(_ROLES[role], content, learnt, json.dumps(extra) if extra else "")

    def tools(self) -> str:
        """The functions of ``tools`` as JSON; the column may hold them as JSON text."""
        tools = self.get("tools")
        if isinstance(tools, str) and tools.strip():
            tools = self._parsed(tools, "'tools'")
        if not tools:
            return ""
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise self.error("has 'tools' that aren't a list of JSON objects", "'tools' is no list")
        return json.dumps([_without_none(tool) for tool in tools], ensure_ascii=False)

    def _tool_calls(self, calls: Any) -> list[Any]:
        calls = calls if isinstance(calls, list) else [calls]
        if not all(
            isinstance(call, Mapping) and isinstance(call.get("function", call), Mapping) for call in calls
        ):
            raise self.error("has 'tool_calls' that aren't a list of JSON objects", "'tool_calls' is no list")
        made = []
        for call in calls:
            function = _without_none(call.get("function", call))
            arguments = function.get("arguments")
            if isinstance(arguments, str):  # OpenAI's form; templates expect an object
                function["arguments"] = self._parsed(arguments or "{}", "a tool call's 'arguments'")
            call_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
            made.append({**call_id, "type": "function", "function": function})
        return made

    def _parsed(self, text: str, what: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"has {what} that is no JSON ({error})", "malformed JSON in a field") from error

    def _content(self, value: Any) -> str:
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


def _reasoning_key(holder: Mapping[str, Any], response: str) -> str | None:
    """Where ``holder`` keeps the reasoning of a response that holds none of its own."""
    if "</think>" in response:
        return None
    return next((key for key in _REASONING_KEYS if _holds(holder.get(key))), None)


def _reasoned(reasoning: str, response: str) -> str:
    return f"<think>\n{reasoning}\n</think>\n\n{response}"


def _without_none(value: Any) -> Any:
    """Without the keys that tables add for other rows."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _holds(value: Any) -> bool:
    return value is not None and value != "" and value != [] and value != {}
