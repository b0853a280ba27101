"""Names of variants, which are folders, columns of tables and keys of reports at once."""

from __future__ import annotations

from pathlib import Path

from dskd_lightning.errors import UserError

__all__ = ["check_name"]

_FORBIDDEN = frozenset('/\\=[]|:*?<>"')
"""Parts of paths, of ``NAME=FOLDER``, of markup and of Markdown's tables; what file systems refuse."""
_TAKEN = frozenset({"grid", "report", "table.md", "table.json", "curves.png"})
_MOST_BYTES = 100


def check_name(path: Path, name: str) -> None:
    """Refuse what can't be a plain folder in the study's own.

    Args:
        path: the study file, for the message.
        name: of a variant.

    Raises:
        UserError: ``name`` would leave the folder, or be misread later on.
    """
    bad = sorted({c for c in name if c in _FORBIDDEN or not c.isprintable()})
    if not name.strip():
        reason = "is empty"
    elif bad:
        reason = f"has {bad[0]!r} in it"
    elif name[0] in ".-~ " or name[-1] in ". ":
        reason = "begins with '.', '-', '~' or a space, or ends with '.' or a space"
    elif name.lower() in _TAKEN:
        reason = "is what the study calls a file or folder of its own"
    elif len(name.encode()) > _MOST_BYTES:
        reason = f"is longer than {_MOST_BYTES} bytes"
    else:
        return
    raise UserError(
        f"{path}: the variant name {name[:60]!r} {reason}: variants are folders of the study, rename it."
    )
