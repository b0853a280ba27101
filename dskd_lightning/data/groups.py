"""What of a set of sources is prepared together: by one machine, into one folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dskd_lightning.data.sources import Source

__all__ = ["groups_of"]

_BYTES = 2**28
"""Of small files that are prepared together: much for one folder, little for one of many machines."""


def groups_of(sources: Sequence[Source], limit: int | None = None) -> list[list[Source]]:
    """Consecutive sources; where a group ends follows from the files' sizes alone.

    Files of this machine that stand side by side make a group of up to 256 MiB. Any other source is one by
    itself: when it can't be read, or has changed, that costs no more than itself.

    Args:
        sources: in order.
        limit: most examples of all of them, which keeps them together.
    """
    if limit is not None:
        return [list(sources)]
    groups: list[list[Source]] = []
    size = math.inf
    for source in sources:
        more = source.path.stat().st_size if source.is_file and isinstance(source.path, Path) else math.inf
        if size + more <= _BYTES:
            groups[-1].append(source)
            size += more
        else:
            groups.append([source])
            size = more
    return groups
