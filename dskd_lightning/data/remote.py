"""Files behind URLs, through fsspec; what is read of them never lies on the disk."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from dskd_lightning.data.file_names import is_beside_data
from dskd_lightning.data.file_systems import file_system
from dskd_lightning.data.remote_faults import Patience, SourceChanged, asked
from dskd_lightning.data.remote_stream import RemoteStream
from dskd_lightning.data.urls import masked, path_of, protocol_of, stable
from dskd_lightning.errors import UserError

__all__ = ["DataFile", "RemoteFile", "remote_files", "size_of"]

_log = logging.getLogger(__name__)
_PIECE = 1 << 17  # bytes that parsers get at a time
_OPENED = 8 << 20
_VERSIONS = (
    "sha256", "md5hash", "content-md5", "digest", "etag", "crc32c", "crc", "generation", "xet_hash",
    "blob_id", "oid", "version_id", "last-modified", "lastmodified", "last_modified", "mtime", "modified",
    "updated", "created",
)  # fmt: skip
"""What servers call the version of a file, those that go by the content first."""


@dataclass
class RemoteFile:
    """A file behind a URL, with as much of `pathlib.Path` as parsers need; as a text it is `masked`.

    Args:
        url: of the file.
    """

    url: str = field(repr=False)
    _seen: Mapping[str, Any] | None = field(default=None, init=False, repr=False, compare=False)
    _hash: str | None = field(default=None, init=False, repr=False, compare=False)

    def __str__(self) -> str:
        return masked(self.url)

    @property
    def suffix(self) -> str:
        return PurePosixPath(path_of(self.url)).suffix

    @property
    def size(self) -> int | None:
        """Bytes; None where the server doesn't say it."""
        return self._first_info().get("size")

    @property
    def stem(self) -> str:
        return PurePosixPath(path_of(self.url)).stem

    def open(self, mode: str = "rb", anywhere: bool = False) -> io.BufferedReader:
        """The file's bytes.

        Args:
            mode: ``rb``.
            anywhere: it is read here and there rather than from the beginning to the end.

        Raises:
            UserError: it isn't there, not with these credentials, or the server can't be read ``anywhere``.
        """
        info, (system, path) = self._first_info(), file_system(self.url)
        size = info.get("size")
        known = {"size": size} if protocol_of(self.url) in ("http", "https") else {}

        def opened(ranges: bool) -> Any:
            if not ranges:
                return system.open(path, "rb", block_size=0)
            return system.open(path, "rb", block_size=_OPENED, cache_type="none", **known)

        refusal = UserError(
            f"The server of '{self}' can't begin to read in the middle of a file, as this kind of file "
            "needs: give JSON Lines, or download it."
        )
        stream = RemoteStream(
            opened, size, Patience(self.url, str(self)), self.check_unchanged,
            ranges=size is not None and info.get("partial", True), refusal=refusal if anywhere else None,
        )  # fmt: skip
        return io.BufferedReader(stream, _PIECE)

    def fingerprint(self) -> str:
        """Hash of the URL, without what signs it, and of the version that the server tells.

        Raises:
            UserError: the file can't be read.
        """
        version = _version(self._first_info())
        if version is None:
            if self._hash is None:
                _log.warning(
                    "%s: its server says neither version nor time of change; it is read whole to know them.",
                    self,
                )
                self._hash = self._content_hash()
            version = self._hash
        return hashlib.sha256(f"{stable(self.url)} {version}".encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Compare the file with what it was when it was first looked at.

        Raises:
            SourceChanged: it is another one.
            SourceUnavailable: it can't be looked at.
        """
        before, now = self._first_info(), self._info()
        same = before.get("size") == now.get("size") and _version(before) == _version(now)
        if not same or (self._hash is not None and self._hash != self._content_hash()):
            raise SourceChanged(
                f"'{self}' has changed while it was read: start again, which prepares it anew and keeps "
                "the other files that are finished."
            )

    def _first_info(self) -> Mapping[str, Any]:
        if self._seen is None:
            self._seen = self._info()
        return self._seen

    def _info(self) -> Mapping[str, Any]:
        system, path = file_system(self.url)

        def ask() -> Mapping[str, Any]:
            system.invalidate_cache(path)
            found: Mapping[str, Any] = system.info(path)
            return found

        return asked(ask, self.url, str(self))

    def _content_hash(self) -> str:
        digest, self_hash = hashlib.sha256(), self._hash
        self._hash = None  # `check_unchanged` within the reading would read it again
        try:
            with self.open() as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
        finally:
            self._hash = self_hash
        return digest.hexdigest()


DataFile: TypeAlias = Path | RemoteFile


def size_of(path: DataFile) -> int | None:
    """Bytes of a file here or behind a URL; None where nobody says it."""
    return path.stat().st_size if isinstance(path, Path) else path.size


def remote_files(url: str, wanted: Callable[[str], bool]) -> list[RemoteFile]:
    """The file that ``url`` names, or those that its pattern matches, or all below it, sorted.

    Args:
        url: with ``*``, ``**`` or ``[...]`` a pattern; without the name of a data file at its end, a folder.
        wanted: whether the name of a file is that of a data file.

    Raises:
        UserError: nothing is there, or it can't be listed.
    """
    pattern = any(character in path_of(url) for character in "*[")
    if not pattern and wanted(path_of(url)):
        return [RemoteFile(url)]
    system, path = file_system(url)
    list_files = partial(system.glob, path) if pattern else partial(system.find, path)
    paths = {system.unstrip_protocol(found) for found in asked(list_files, url, masked(url))}
    files = sorted(
        found for found in paths if wanted(path_of(found)) and not _is_beside_data(found, url, paths)
    )
    if not files:
        raise UserError(f"'{masked(url)}' names no data file: correct the URL.")
    return [RemoteFile(found) for found in files]


def _is_beside_data(found: str, folder: str, all_of_them: set[str]) -> bool:
    below = PurePosixPath(path_of(found)).parts[len(PurePosixPath(path_of(folder)).parts) - 1 :]
    folder, _, name = found.rpartition("/")
    return is_beside_data(below, name, lambda other: f"{folder}/{other}" in all_of_them)


def _version(info: Mapping[str, Any]) -> str | None:
    """What tells this version of a file from others; None where nothing does."""
    values = {str(name).lower(): value for name, value in info.items()}
    for name in _VERSIONS:
        if values.get(name):
            return f"{name} {values[name]} {info.get('size')}"
    return None
