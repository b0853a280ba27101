"""`torch.compile` of the decoder: minutes on a CPU, so the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from .features import fitted
from .setup import Setup


def checks(setup: Setup) -> Iterator[tuple[str, Callable[[], str]]]:
    if not setup.pretended:
        yield "compile", partial(fitted, setup, "DSKD", {}, student={"compile": True})
