"""One line of what `dskd doctor` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        state: ``failed`` keeps the run from starting, ``look`` may be meant.
        what: it is about.
        text: what was found, and the remedy.
    """

    state: Literal["ok", "look", "failed"]
    what: str
    text: str
