"""How far something long is, in plain lines for logs that nobody watches on a terminal."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

__all__ = ["Heartbeat", "Progress", "duration"]

_log = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """Two units of time as one reads them; empty where it isn't known."""
    if not math.isfinite(seconds):
        return ""
    whole = max(0, round(seconds))
    for size, unit, smaller, name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole} s"


class Heartbeat:
    """Logs a line every ``seconds``, from a thread of its own: a single step may take longer than that.

    Args:
        line: what to say now; an empty text is left out.
        seconds: between two lines.
    """

    def __init__(self, line: Callable[[], str], seconds: float = 30.0) -> None:
        self.line, self.seconds = line, seconds
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; the first line comes after ``seconds``."""
        self.stop()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._stopped,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End; no line comes afterwards."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def say(self) -> None:
        """A line now."""
        if line := self.line():
            _log.info(line)

    def _run(self, stopped: threading.Event) -> None:
        while not stopped.wait(self.seconds):
            self.say()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Progress(Heartbeat):
    """Work of known length, as ``teacher cache: 1,200 of 4,000 tokens (30 %), 8 s left``.

    Where nobody knows how many ``unit`` there are, though how much of the work is done, set ``share`` (from
    0 to 1, None for unknown) beside ``done``.

    Args:
        what: the work.
        total: how much there is; None where nobody knows.
        unit: of what.
        seconds: between two lines.
        clock: seconds.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(self._described, seconds)
        self._clock, self.unit = clock, unit
        self.begin(what, total)

    def begin(self, what: str, total: int | None) -> None:
        """Other work, from its beginning."""
        self.what, self.total, self.done = what, total, 0
        self.share: float | None = None
        self.go_on()

    def go_on(self) -> None:
        """What is done so far was done before: it says nothing about the speed from now on."""
        self._before = (self.done, self._share() or 0.0)
        self._since = self._clock()

    def _described(self) -> str:
        spent = self._clock() - self._since
        parts = [f"{self.what}: {self.done:,}"]
        if self.total is not None:
            parts[0] += f" of {self.total:,}"
        parts[0] += f" {self.unit}"
        share = self._share()
        if share is not None:
            parts[0] += f" ({share:.0%})"
        if (lately := self.done - self._before[0]) > 0:
            parts.append(f"{lately / max(spent, 1e-9):,.1f} a second")
        if share is not None and share > self._before[1]:
            parts.append(f"{duration(spent / (share - self._before[1]) * (1 - share))} left")
        else:
            parts.append(f"{duration(spent)} so far")
        return ", ".join(parts)

    def _share(self) -> float | None:
        return self.done / self.total if self.total else self.share
