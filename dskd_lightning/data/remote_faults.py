"""Failures of other machines: which of them pass, and in what words the rest are told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

from dskd_lightning.data.urls import protocol_of, scrubbed
from dskd_lightning.errors import UserError
from dskd_lightning.runs.text import shorten, visible
from dskd_lightning.waiting import answer_within

__all__ = ["Patience", "SourceChanged", "SourceUnavailable", "asked", "final_fault", "said", "within"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_ATTEMPTS = 8
_BACKOFF = 1.0  # seconds, doubled each time
_LONGEST_WAIT = 60.0
_SECONDS = 60.0
"""Most of one answer: of what is read, a piece that is small where the network is slow."""
_SHOWN = 200
_PASSING = (408, 409, 425, 429)  # and those from 500 on
_REFUSED = (401, 403, 407)
_WITHOUT_CREDENTIALS = (
    "DefaultCredentialsError", "GatedRepoError", "LocalTokenNotFoundError", "NoCredentialsError",
    "PartialCredentialsError", "RefreshError", "TokenRetrievalError",
)  # fmt: skip
_CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3='{\"anon\": true}' "
    "for a public bucket",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "set HF_TOKEN or run `hf auth login`",
    "http": "sign the URL anew, or put the host's login and password into ~/.netrc",
}
_CREDENTIALS |= {"s3a": _CREDENTIALS["s3"], "gcs": _CREDENTIALS["gs"], "https": _CREDENTIALS["http"]}


class SourceUnavailable(UserError):
    """A source can't be read now; what is prepared of it is right, and is gone on with later."""


class SourceChanged(UserError):
    """A source isn't what it was when reading it began."""


class Patience:
    """How often the same has failed since there was progress, and how long to wait now.

    Args:
        url: what is read.
        name: that URL as it is shown.
    """

    def __init__(self, url: str, name: str) -> None:
        self._url, self._name, self._failures = url, name, 0

    def progressed(self) -> None:
        """Forget the failures."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Wait for the next attempt.

        Raises:
            UserError: another attempt would fail too, or there were enough of them.
        """
        if (fault := final_fault(error, self._url, self._name)) is not None:
            raise fault from error
        self._failures += 1
        if self._failures >= _ATTEMPTS:
            raise SourceUnavailable(
                f"Can't read '{self._name}' after {self._failures} attempts ({said(error)}): look at the "
                "network and the server, and start again, which goes on with what is finished."
            ) from error
        wait = min(_asked_to_wait(error) or _BACKOFF * 2 ** (self._failures - 1), _LONGEST_WAIT)
        _log.warning("%s: %s; trying again in %.0f s.", self._name, said(error), wait)
        time.sleep(wait)


def asked(ask: Callable[[], _T], url: str, name: str) -> _T:
    """The answer of ``ask``, asked again after failures that may pass.

    Raises:
        UserError: see `Patience.failed`.
    """
    patience = Patience(url, name)
    while True:
        try:
            return within(ask)
        except Exception as error:
            patience.failed(error)


def within(ask: Callable[[], _T]) -> _T:
    """The answer of ``ask``, or its error, waited for no longer than `_SECONDS`.

    Raises:
        TimeoutError: there is none in time.
    """
    return answer_within(_SECONDS, ask, f"no answer within {_SECONDS:g} s")


def final_fault(error: Exception, url: str, name: str) -> UserError | None:
    """What to say of an error that no further attempt helps; None where one may.

    Args:
        error: of fsspec or what it calls.
        url: what is read.
        name: that URL as it is shown.
    """
    error = _reason(error)
    if isinstance(error, UserError):
        return error
    status, kind = _status(error), type(error).__name__
    if kind in _WITHOUT_CREDENTIALS or isinstance(error, PermissionError) or status in _REFUSED:
        remedy = _CREDENTIALS.get(protocol_of(url), "give those that its server asks for")
        return SourceUnavailable(
            f"The credentials for '{name}' are missing or refused ({said(error)}): {remedy}."
        )
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return SourceUnavailable(f"The data file '{name}' doesn't exist: correct the URL.")
    if status is not None and 400 <= status < 500 and status not in _PASSING:
        return SourceUnavailable(f"Can't read '{name}' ({said(error)}): correct the URL.")
    passes = isinstance(error, OSError) or _is_of_network(error) or status is not None
    if not passes or kind in ("OfflineModeIsEnabled", "IsADirectoryError") or "Certificate" in kind:
        return SourceUnavailable(f"Can't read '{name}' ({said(error)}): correct the URL or the settings.")
    return None


def said(error: Exception) -> str:
    """An error in a few words, without secrets."""
    error = _reason(error)
    if (status := _status(error)) is not None:
        reason = getattr(error, "message", "") or getattr(
            getattr(error, "response", None), "reason_phrase", ""
        )
        text = f"HTTP {status} {reason}"
    else:
        text = (
            str(error)
            if type(error) in (TimeoutError, ConnectionError)
            else f"{type(error).__name__}: {error}"
        )
    return shorten(visible(scrubbed(text)).strip(": "), _SHOWN)


def _reason(error: Exception) -> Exception:
    """fsspec tells every failure over HTTP as a file that isn't there."""
    while isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    """Of HTTP, as the libraries keep it: in the error or in its response."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        response = SimpleNamespace(status_code=response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    for holder, name in ((error, "status"), (response, "status_code"), (error, "code")):
        found = getattr(holder, name, None)
        if found is not None:
            return int(found) if str(found).isdigit() and 400 <= int(found) < 600 else None
    return None


def _is_of_network(error: Exception) -> bool:
    """Whether it comes of a library that talks to servers; few of their errors are an OSError."""
    return any(
        kind.__module__.partition(".")[0]
        in (
            "aiohttp",
            "botocore",
            "aiobotocore",
            "gcsfs",
            "httpx",
            "httpcore",
            "requests",
            "urllib3",
            "http",
            "huggingface_hub",
            "fsspec",
        )
        and not issubclass(kind, ValueError)
        for kind in type(error).__mro__
    )


def _asked_to_wait(error: Exception) -> float:
    headers: Any = getattr(_reason(error), "headers", None) or getattr(
        getattr(error, "response", None), "headers", None
    )
    value = str(headers.get("Retry-After", "")) if hasattr(headers, "get") else ""
    return float(value) if value.isdigit() else 0.0
