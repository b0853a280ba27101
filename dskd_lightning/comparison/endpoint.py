"""The one call made to an OpenAI-compatible chat endpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dskd_lightning.http_json import EndpointError, JsonEndpoint

__all__ = ["ChatEndpoint", "EndpointError", "Reply"]


@dataclass(frozen=True)
class Reply:
    """Text of a completion and the tokens it was billed for (0 where the server does not say)."""

    text: str
    tokens: int


@dataclass
class ChatEndpoint:
    """An OpenAI-compatible ``/chat/completions`` endpoint.

    Args:
        base_url: up to and without ``/chat/completions``, e.g. ``http://127.0.0.1:8000/v1``.
        model: the model to ask for.
        api_key_variable: name of the environment variable that holds the key; None sends none.
        max_tokens: most tokens of a reply.
        timeout: most seconds of one attempt, from connecting to the reply's last byte.
        retries: further attempts after a failure that may pass.
        backoff: seconds before the first retry, doubled each time.
        sleep: how to wait, for tests.
    """

    base_url: str
    model: str
    api_key_variable: str | None = None
    max_tokens: int = 512
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 1.0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self._endpoint = JsonEndpoint(
            self.base_url, self.api_key_variable, self.timeout, self.retries, self.backoff, self.sleep,
            who="judge",
        )  # fmt: skip

    def complete(self, system: str, user: str) -> Reply:
        """Ask once, at temperature 0.

        Raises:
            EndpointError: refused, or still failing after the retries.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        return self._endpoint.post("chat/completions", body, _reply)


def _reply(answer: Any) -> Reply:
    text = answer["choices"][0]["message"]["content"]
    usage = answer.get("usage") or {}
    return Reply(str(text or ""), int(usage.get("total_tokens") or 0))
