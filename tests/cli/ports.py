"""Ports of this machine for processes that start later than they are told them."""

from __future__ import annotations

import itertools
import os
import socket

_numbers = itertools.count(os.getpid())


def free_port() -> int:
    """Outside the range from which others are given theirs, another for each worker of the tests."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8
    for number in _numbers:
        port = 20_000 + 1_500 * worker + number % 1_500
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("the numbers have no end")
