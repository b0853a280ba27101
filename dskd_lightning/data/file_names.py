"""Which files of a folder aren't data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["is_beside_data"]


def is_beside_data(below: Sequence[str], name: str, has_neighbour: Callable[[str], bool]) -> bool:
    """Copies that editors and systems leave behind: ``.ipynb_checkpoints``, ``._train.jsonl``, ...; and
    ``train.meta.json``, in which ``dskd generate`` says how it made ``train.jsonl``.

    Args:
        below: what of the file's path lies below the folder that is read.
        name: of the file.
        has_neighbour: whether a file of that name lies beside it.
    """
    stem = name.removesuffix(".meta.json")
    hidden = any(part.startswith(".") for part in below)
    return hidden or (stem != name and has_neighbour(f"{stem}.jsonl"))
