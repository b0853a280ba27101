"""The file systems behind URLs, as fsspec finds them."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from dskd_lightning.data.remote_faults import SourceUnavailable, final_fault, said
from dskd_lightning.data.urls import masked, protocol_of
from dskd_lightning.errors import UserError

__all__ = ["file_system"]

_PACKAGES = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
"""Of a protocol: the package that reads it, and our extra that installs this."""


def file_system(url: str) -> tuple[Any, str]:
    """An fsspec file system and the path there of what ``url`` names.

    Raises:
        UserError: the protocol isn't known, or its package or credentials are missing.
    """
    import fsspec

    protocol, name = protocol_of(url), masked(url)
    try:
        system, path = fsspec.core.url_to_fs(url, **_options(url))
    except ImportError as error:
        package, extra = _PACKAGES.get(protocol, ("", ""))
        if package:
            raise UserError(
                f"Reading '{name}' needs the package {package}: pip install 'dskd-lightning[{extra}]'."
            ) from error
        raise UserError(f"Reading '{name}' needs another package ({said(error)}): install it.") from error
    except Exception as error:
        if fault := final_fault(error, url, name):
            raise fault from error
        raise SourceUnavailable(f"Can't read '{name}' ({said(error)}): correct the URL.") from error
    return system, str(path)


def _options(url: str) -> dict[str, Any]:
    """Of HTTP: bytes as they lie there, and the environment's proxies and ``~/.netrc``."""
    if protocol_of(url) not in ("http", "https"):
        return {}
    import aiohttp

    return {
        "headers": {"Accept-Encoding": "identity"},
        "client_kwargs": {
            "auto_decompress": False,
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=60),
            "trust_env": not _is_here(urlsplit(url).hostname or ""),
        },
    }


def _is_here(host: str) -> bool:
    """Whether a host is this machine, to which no proxy leads."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
