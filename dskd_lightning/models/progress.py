"""Progress bars of the libraries that load and save models."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

__all__ = ["no_progress_bars"]


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the bars of transformers, some of which it offers no switch for."""
    from tqdm.auto import tqdm

    original = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(original, disable=True)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        tqdm.__init__ = original  # type: ignore[method-assign]
