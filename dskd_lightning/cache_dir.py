"""Where what can be computed again is kept."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir"]


def cache_dir(part: str) -> Path:
    """Folder ``part`` below ``$DSKD_CACHE_DIR``, else ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if root := os.environ.get("DSKD_CACHE_DIR"):
        return Path(root).expanduser() / part
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dskd_lightning" / part
