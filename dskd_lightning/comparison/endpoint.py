"""The one call made to an OpenAI-compatible chat endpoint."""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dskd_lightning.errors import UserError

__all__ = ["ChatEndpoint", "EndpointError", "Reply"]

logger = logging.getLogger(__name__)

_RETRIED = (408, 409, 429, 500, 502, 503, 504)


class EndpointError(RuntimeError):
    """The endpoint could not be used, after all retries."""


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
        timeout: seconds to wait for a reply.
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
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"judge: base_url must start with http:// or https://, not {self.base_url!r}.")
        if self.api_key_variable is not None and not os.environ.get(self.api_key_variable):
            raise UserError(
                f"judge: the environment variable {self.api_key_variable} is not set; export the key there."
            )

    def complete(self, system: str, user: str) -> Reply:
        """Ask once, at temperature 0.

        Raises:
            EndpointError: refused, or still failing after the retries.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        wait = self.backoff
        for attempt in range(self.retries + 1):
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                reason, final = f"HTTP {error.code} {error.reason}", error.code not in _RETRIED
                asked = error.headers.get("Retry-After", "") if error.headers else ""
                pause = float(asked) if asked.isdigit() else wait
                error.close()
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                reason, final, pause = f"{type(error).__name__}: {error}", False, wait
            if final or attempt == self.retries:
                raise EndpointError(f"{self.base_url} failed after {attempt + 1} attempts ({reason})")
            logger.warning("%s: %s; trying again in %.1f s", self.base_url, reason, min(pause, 60.0))
            self.sleep(min(pause, 60.0))
            wait *= 2
        raise AssertionError("unreachable")

    def _post(self, body: dict[str, Any]) -> Reply:
        headers = {"Content-Type": "application/json"}
        if self.api_key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_variable]}"
        url = self.base_url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            answer = json.loads(response.read())
        text = answer["choices"][0]["message"]["content"]
        usage = answer.get("usage") or {}
        return Reply(str(text or ""), int(usage.get("total_tokens") or 0))
