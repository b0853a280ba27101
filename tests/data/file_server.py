"""An HTTP server of files on this machine that stalls, breaks off, refuses and recovers as it is told."""

from __future__ import annotations

import gzip
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from served import served

from dskd_lightning.data import remote_faults, remote_stream


class FileServer:
    """What lies there, what was asked for, and how to answer.

    Attributes:
        files: content by path.
        faults: of the next requests for content, one each: ``cut`` (half of the body, then the end of the
            connection), ``stall`` (half of it, then nothing), ``drop`` (no answer), a status, or ``""``.
        statuses: that every request for a path is answered with.
        always: the fault of all requests for a path after the first ``n`` ones: ``{path: (n, fault)}``.
        ranges: whether it begins in the middle of a file.
        versions: the header that tells a file's version: ``ETag``, ``Last-Modified`` or none.
        head: whether it answers HEAD.
        packs: whether it packs what it sends for those that take that, and says of packed files that it did.
        asked: path and first byte of each request for content.
        sent: bytes of all bodies.
        before: called with the path before content is sent.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[str | int] = []
        self.statuses: dict[str, int] = {}
        self.always: dict[str, tuple[int, str | int]] = {}
        self.ranges, self.head, self.versions, self.packs = True, True, "ETag", False
        self.asked: list[tuple[str, int]] = []
        self.queries: list[str] = []
        self.sent = 0
        self.before: Callable[[str], None] = lambda path: None
        self.url = ""
        self.closing = threading.Event()
        self.lock = threading.Lock()

    def fault(self, path: str) -> str | int:
        with self.lock:
            count, fault = self.always.get(path, (0, ""))
            if path in self.always and sum(found == path for found, _ in self.asked) > count:
                return fault
            return self.faults.pop(0) if self.faults else ""


def small_pieces(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Pieces of some rows, so that files have many, and no waiting."""
    for name, size in (("_FIRST", 64), ("_LEAST", 16), ("_MOST", most)):
        monkeypatch.setattr(remote_stream, name, size)
    monkeypatch.setattr(remote_faults, "_BACKOFF", 0.001)


@contextmanager
def serving(server: FileServer) -> Iterator[FileServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            path = self._path()
            if not server.head:
                self._status(405)
            elif path in server.statuses or path not in server.files:
                self._status(server.statuses.get(path, 404))
            else:
                self._headers(200, server.files[path], len(server.files[path]))

        def do_GET(self) -> None:
            path = self._path()
            if path in server.statuses or path not in server.files:
                self._status(server.statuses.get(path, 404))
                return
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            with server.lock:
                server.asked.append((path, int(asked[1]) if asked else 0))
            server.before(path)
            content, fault = server.files[path], server.fault(path)
            if self._packs():
                content = gzip.compress(content)
            if fault == "drop":
                self.close_connection = True
                return
            if isinstance(fault, int):
                self._status(fault)
                return
            status, body = 200, content
            if asked and server.ranges:
                status, body = 206, content[int(asked[1]) : int(asked[2]) + 1]
                if not body:
                    self._status(416)
                    return
            self._headers(status, content, len(body))
            body = body[: len(body) // 2] if fault else body
            server.sent += len(body)
            self.wfile.write(body)
            self.wfile.flush()
            if fault:
                self.close_connection = True
            if fault == "stall":
                server.closing.wait(60)

        def _packs(self) -> bool:
            return server.packs and "gzip" in (self.headers.get("Accept-Encoding") or "")

        def _path(self) -> str:
            path, _, query = self.path.partition("?")
            server.queries.append(query)
            return path

        def _headers(self, status: int, content: bytes, length: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            digest = hashlib.sha256(content).hexdigest()
            if server.versions == "ETag":
                self.send_header("ETag", f'"{digest[:16]}"')
            elif server.versions == "Last-Modified":
                self.send_header("Last-Modified", self.date_time_string(int(digest[:7], 16)))
            if self._packs() or (server.packs and self.path.endswith(".gz")):
                self.send_header("Content-Encoding", "gzip")
            if self.path.endswith("/"):
                self.send_header("Content-Type", "text/html")
            self.end_headers()

        def _status(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Of connections that the other side has given up."""

    with served(Quiet(("127.0.0.1", 0), Handler)) as server.url:
        try:
            yield server
        finally:
            server.closing.set()
