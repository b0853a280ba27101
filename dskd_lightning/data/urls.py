"""Addresses of data, and how they are shown: without passwords and signatures."""

from __future__ import annotations

import hashlib
import os
import re
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from dskd_lightning.errors import UserError

__all__ = ["expanded", "is_url", "masked", "path_of", "protocol_of", "scrubbed", "stable"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_IN_TEXT = re.compile(_URL.pattern + r"[^\s'\"<>)\]]+")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_HIDDEN = "***"
_SIGNATURE = re.compile(
    r"x-(amz|goog|ms)-.*|signature|sig|expires|policy|key-pair-id|awsaccesskeyid|googleaccessid|.*token|"
    r"s[eprtv]|sk(oid|tid|t|e|s|v)|spr|sip",
    re.IGNORECASE,
)
"""Parameters that are new each time that a URL is signed (S3, CloudFront, Google, Azure)."""


def is_url(entry: str) -> bool:
    """Whether an entry of the data names a protocol (``s3://...``)."""
    return _URL.match(entry) is not None


def protocol_of(url: str) -> str:
    """``https`` of ``https://...``."""
    return url.partition("://")[0].lower()


def path_of(url: str) -> str:
    """The part of a URL that ends in the file's name."""
    return unquote(urlsplit(url).path) if _is_http(url) else url.partition("://")[2]


def expanded(url: str) -> str:
    """``url`` with the environment's values for ``${NAME}``, so that secrets needn't be in a config.

    Raises:
        UserError: a variable isn't set.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(
                f"'{masked(url)}' names the environment variable {match[1]}, which isn't set: export it."
            )
        return os.environ[match[1]]

    return _VARIABLE.sub(value, url)


def masked(url: str) -> str:
    """An entry of the data as it may be printed: a URL without user, password and query."""
    if not is_url(url):
        return url
    parts = urlsplit(url)
    if parts.scheme != "hf" and "@" in parts.netloc:
        url = url.replace(parts.netloc, f"{_HIDDEN}@{parts.netloc.rpartition('@')[2]}", 1)
    if not _is_http(url) or parts.query.startswith(_HIDDEN):  # it is masked already
        return url
    url, question, _ = url.partition("#")[0].partition("?")
    rest = _unsigned(parts.query)  # which file is meant, where a query says that
    return url + (f"?{_HIDDEN}{_digest(rest)[:6] if rest else ''}" if question else "")


def scrubbed(text: str) -> str:
    """A library's message with its URLs `masked`, in one line."""
    return _IN_TEXT.sub(lambda match: masked(match[0]), " ".join(text.split()))


def stable(url: str) -> str:
    """What is the same of a URL however often it is signed, as a hash."""
    parts = urlsplit(url)
    if not _is_http(url):
        return _digest(url)
    return _digest(
        urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, _unsigned(parts.query), ""))
    )


def _is_http(url: str) -> bool:
    return protocol_of(url) in ("http", "https")


def _unsigned(query: str) -> str:
    return urlencode([pair for pair in parse_qsl(query, True) if not _SIGNATURE.fullmatch(pair[0])])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
