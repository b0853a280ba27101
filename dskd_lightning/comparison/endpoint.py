"""The one call made to an OpenAI-compatible chat endpoint."""

from __future__ import annotations

import http.client
import json
import logging
import os
import threading
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
_MOST_BYTES = 16 * 2**20
_READ_BYTES = 1 << 16


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key to wherever the server says."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


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
                if 300 <= error.code < 400:
                    reason += ": a redirect isn't followed, which would take the key elsewhere"
                asked = error.headers.get("Retry-After", "") if error.headers else ""
                pause = float(asked) if asked.isdigit() else wait
                error.close()
            except (
                OSError,
                http.client.HTTPException,
                LookupError,
                AttributeError,
                OverflowError,
                RecursionError,
                TypeError,
                ValueError,
            ) as error:
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
        answer = json.loads(_fetch(request, self.timeout))
        text = answer["choices"][0]["message"]["content"]
        usage = answer.get("usage") or {}
        return Reply(str(text or ""), int(usage.get("total_tokens") or 0))


def _fetch(request: urllib.request.Request, seconds: float) -> bytes:
    """The body of the reply.

    A socket's timeout bounds each of its reads, not their number: a server that sends a byte now
    and then would hold us for ever. So a thread reads, and is waited for no longer than this.

    Raises:
        TimeoutError: the reply isn't whole in time.
        OSError: there is none.
    """
    found: list[bytes | Exception] = []

    def read() -> None:
        try:
            with _OPENER.open(request, timeout=seconds) as response:
                found.append(_body(response, time.monotonic() + seconds))
        except Exception as error:  # raised where it is waited for
            found.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError(f"no whole reply in {seconds:g} s")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _body(response: http.client.HTTPResponse, until: float) -> bytes:
    body = bytearray()
    while block := response.read1(_READ_BYTES):
        body += block
        if len(body) > _MOST_BYTES:
            raise ValueError(f"the reply has more than {_MOST_BYTES >> 20} MiB")
        if time.monotonic() > until:
            raise TimeoutError("the reply took too long")
    return bytes(body)
