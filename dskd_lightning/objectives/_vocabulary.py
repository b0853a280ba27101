"""What objectives read of two tokenizers, as tensors sized by the models' heads."""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_lightning.alignment.token_bytes import TokenBytes, token_bytes
from dskd_lightning.structures import ModelSpace

__all__ = ["exact_maps", "extension_ranges", "nearest_map", "sparse_projection", "token_strings"]

_END = "\x00end"


def _keys(space: ModelSpace) -> list[bytes | None]:
    """Bytes of each row of the head; None for special tokens (but the end) and unused rows."""
    known: TokenBytes = token_bytes(space.tokenizer)
    keys: list[bytes | None] = [piece or None for piece in known.pieces[: space.vocab_size]]
    keys += [None] * (space.vocab_size - len(keys))
    for index in known.special | {known.unknown}:
        if 0 <= index < len(keys):
            keys[index] = None
    end = space.tokenizer.eos_token_id
    if end is not None and end < len(keys):
        keys[end] = _END.encode()
    return keys


def _tensor(values: list[int], space: ModelSpace) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=space.head.weight.device)


def exact_maps(student: ModelSpace, teacher: ModelSpace) -> tuple[Tensor, Tensor]:
    """``[student vocab]`` and ``[teacher vocab]``: the id of the same bytes on the other side, or -1.

    Byte encodings and space markers are undone first; the two end-of-sequence tokens count as the
    same, other special tokens match nothing. Of several ids with the same bytes (a byte token and
    the character it stands for), the highest is matched, and the map is one to one.
    """
    keys = [_keys(space) for space in (student, teacher)]
    ids = [{key: index for index, key in enumerate(side) if key is not None} for side in keys]
    maps = [[-1] * len(side) for side in keys]
    for key, index in ids[0].items():
        other = ids[1].get(key)
        if other is not None:
            maps[0][index], maps[1][other] = other, index
    return _tensor(maps[0], student), _tensor(maps[1], student)


def token_strings(space: ModelSpace) -> list[str]:
    """Bytes of each row of the head as a string of bytes, for edit distances."""
    return [_END if key == _END.encode() else (key or b"").decode("latin-1") for key in _keys(space)]


def extension_ranges(space: ModelSpace) -> tuple[Tensor, Tensor, Tensor]:
    """The longer tokens that begin with a token, as a range in an order of the vocabulary.

    Returns:
        ``order`` ``[ordinary tokens]``, ids sorted by their bytes; ``first`` and ``last``
        ``[vocab]``: token ``u``'s bytes begin those of ``order[first[u]:last[u]]`` and no others
        that are longer. Empty ranges for special tokens.
    """
    keys = _keys(space)
    ordinary = [i for i, key in enumerate(keys) if key is not None and key != _END.encode()]
    order = sorted(ordinary, key=lambda i: keys[i] or b"")
    first, last = [0] * len(keys), [0] * len(keys)
    open_: list[int] = []  # tokens, each a prefix of the next, whose ranges still grow
    place = 0
    while place < len(order):
        text = keys[order[place]] or b""
        while open_ and not text.startswith(keys[open_[-1]] or b""):
            last[open_.pop()] = place
        stop = place
        while stop < len(order) and keys[order[stop]] == text:
            stop += 1
        for index in order[place:stop]:
            first[index] = stop
            last[index] = stop
            open_.append(index)
        place = stop
    for index in open_:
        last[index] = place
    return _tensor(order, space), _tensor(first, space), _tensor(last, space)


def nearest_map(student: ModelSpace, teacher: ModelSpace, cache_dir: str | None = None) -> Tensor:
    """``[teacher vocab]``: the student token nearest to each teacher token by edit distance, or -1."""
    raise NotImplementedError


def sparse_projection(student: ModelSpace, teacher: ModelSpace) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of ``W [student vocab, teacher vocab]``: rows, columns, weights."""
    raise NotImplementedError
