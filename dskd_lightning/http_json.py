"""JSON over HTTP to a server that may be slow, busy or hostile; the key never leaves its origin."""

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
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dskd_lightning.errors import UserError
from dskd_lightning.waiting import answer_within

__all__ = ["EndpointError", "JsonEndpoint"]

logger = logging.getLogger(__name__)

_RETRIED = (408, 409, 429, 500, 502, 503, 504)
_MOST_BYTES = 16 * 2**20
_READ_BYTES = 1 << 16
_LONGEST_WAIT = 60.0
_SHOWN = 200  # characters of a refusal's own words

_T = TypeVar("_T")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key to wherever the server says."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class EndpointError(RuntimeError):
    """The endpoint could not be used, after all retries."""


class _RefusedError(Exception):
    """A status that is no success, with how the server's own words begin."""

    def __init__(self, error: urllib.error.HTTPError) -> None:
        super().__init__(f"HTTP {error.code} {error.reason}")
        self.status = error.code
        self.retry_after: str = error.headers.get("Retry-After", "") if error.headers else ""
        try:
            text = error.read(8 * _SHOWN).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException, ValueError):
            text = ""
        error.close()
        self.words = " ".join(text.split())


@dataclass
class JsonEndpoint:
    """Where JSON is posted to.

    Args:
        base_url: up to the paths that are posted to, e.g. ``http://127.0.0.1:8000/v1``.
        api_key_variable: name of the environment variable that holds the key; None sends none.
        timeout: most seconds of one attempt, from connecting to the reply's last byte.
        retries: further attempts after a failure that may pass.
        backoff: seconds before the first retry, doubled each time.
        sleep: how to wait, for tests.
        who: how messages to the user begin.
        requests_per_minute: most requests, over all threads; None for no limit.

    Raises:
        UserError: no HTTP address, or no key in the variable.
    """

    base_url: str
    api_key_variable: str | None = None
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 1.0
    sleep: Callable[[float], None] = time.sleep
    who: str = "endpoint"
    requests_per_minute: float | None = None
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _next: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(
                f"{self.who}: base_url must start with http:// or https://, not {self.base_url!r}."
            )
        if self.api_key_variable is not None and not os.environ.get(self.api_key_variable):
            raise UserError(
                f"{self.who}: the environment variable {self.api_key_variable} is not set; export the key "
                "there."
            )

    def post(self, path: str, body: dict[str, Any], read: Callable[[Any], _T]) -> _T:
        """What ``read`` makes of the reply; a reply that it can't read may be asked for again.

        Raises:
            EndpointError: refused, or still failing after the retries.
        """
        wait = self.backoff
        for attempt in range(self.retries + 1):
            self._take_turn()
            try:
                return read(json.loads(_fetch(self._request(path, body), self.timeout)))
            except UserError:
                raise
            except _RefusedError as error:
                reason, final = str(error), error.status not in _RETRIED
                if 300 <= error.status < 400:
                    reason += ": a redirect isn't followed, which would take the key elsewhere"
                elif error.words:
                    reason += f": {self._without_key(error.words)[:_SHOWN]}"
                pause = float(error.retry_after) if error.retry_after.isdigit() else wait
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
            pause = min(pause, _LONGEST_WAIT)
            logger.warning("%s: %s; trying again in %.1f s", self.base_url, reason, pause)
            self.sleep(pause)
            wait *= 2
        raise AssertionError("unreachable")

    def _request(self, path: str, body: dict[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self.api_key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_variable]}"
        url = f"{self.base_url.rstrip('/')}/{path}"
        return urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")

    def _without_key(self, text: str) -> str:
        """What a server says, should it repeat the key."""
        return (
            text if self.api_key_variable is None else text.replace(os.environ[self.api_key_variable], "***")
        )

    def _take_turn(self) -> None:
        if self.requests_per_minute is None:
            return
        with self._turn:
            now = time.monotonic()
            due, self._next = max(now, self._next), max(now, self._next) + 60.0 / self.requests_per_minute
        if due > now:
            self.sleep(due - now)


def _fetch(request: urllib.request.Request, seconds: float) -> bytes:
    """The body of the reply.

    Raises:
        TimeoutError: the reply isn't whole in time.
        OSError: there is none.
        _RefusedError: its status is no success.
    """

    def read() -> bytes:
        try:
            with _OPENER.open(request, timeout=seconds) as response:
                return _body(response, time.monotonic() + seconds)
        except urllib.error.HTTPError as error:
            raise _RefusedError(error) from error

    return answer_within(seconds, read, f"no whole reply in {seconds:g} s")


def _body(response: http.client.HTTPResponse, until: float) -> bytes:
    body = bytearray()
    while block := response.read1(_READ_BYTES):
        body += block
        if len(body) > _MOST_BYTES:
            raise ValueError(f"the reply has more than {_MOST_BYTES >> 20} MiB")
        if time.monotonic() > until:
            raise TimeoutError("the reply took too long")
    return bytes(body)
