"""HTTP servers that tests talk to, on this machine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import HTTPServer

__all__ = ["served"]


@contextlib.contextmanager
def served(server: HTTPServer) -> Iterator[str]:
    """The server's address while it serves."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
