"""Answers that are waited for no longer than one likes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["answer_within"]

_T = TypeVar("_T")


def answer_within(seconds: float, ask: Callable[[], _T], late: str) -> _T:
    """The answer of ``ask``, or its error.

    A thread asks, and is waited for no longer than this: a socket's timeout bounds each of its reads, not
    their number, so that a server that sends a byte now and then would hold us for ever.

    Args:
        seconds: to wait for.
        ask: what asks.
        late: what to say then.

    Raises:
        TimeoutError: there is no answer in time.
    """
    answers: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(ask())
        except BaseException as error:  # raised where it is waited for
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(late)
    return answers[0]
