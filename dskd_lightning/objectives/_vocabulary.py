"""What objectives read of two tokenizers, as tensors sized by the models' heads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dskd_lightning.alignment.nearest import nearest_token_map
from dskd_lightning.alignment.vocabulary import exact_token_map, token_projection, vocabulary_bytes
from dskd_lightning.structures import ModelSpace

__all__ = [
    "exact_maps",
    "extension_ranges",
    "mutual_tokens",
    "nearest_map",
    "sparse_projection",
    "token_strings",
]

_END = "\x00end"


def exact_maps(student: ModelSpace, teacher: ModelSpace) -> tuple[Tensor, Tensor]:
    """``[student vocab]`` and ``[teacher vocab]``: the id of the same bytes on the other side, or -1."""
    pair = student.tokenizer, teacher.tokenizer
    device = student.head.weight.device
    return (
        _fit(exact_token_map(*pair), student, teacher).to(device),
        _fit(exact_token_map(*pair[::-1]), teacher, student).to(device),
    )


def mutual_tokens(student_to_teacher: Tensor, teacher_to_student: Tensor) -> Tensor:
    """Student ids ``[shared]`` whose exact match has them as its own: a one-to-one part of the maps."""
    ids = (student_to_teacher >= 0).nonzero().squeeze(1)
    return ids[teacher_to_student[student_to_teacher[ids]] == ids]


def nearest_map(student: ModelSpace, teacher: ModelSpace, cache_dir: str | None = None) -> Tensor:
    """``[teacher vocab]``: the student token nearest to each teacher token by edit distance, or -1."""
    found = nearest_token_map(teacher.tokenizer, student.tokenizer, cache_dir)
    return _fit(found, teacher, student).to(student.head.weight.device)


def sparse_projection(student: ModelSpace, teacher: ModelSpace) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of ``W [student vocab, teacher vocab]``: rows, columns, weights."""
    entries = token_projection(student.tokenizer, teacher.tokenizer)
    keep = (entries.rows < student.vocab_size) & (entries.columns < teacher.vocab_size)
    device = student.head.weight.device
    rows, columns, weights = (
        torch.from_numpy(values[keep]).to(device)
        for values in (entries.rows, entries.columns, entries.weights)
    )
    return rows, columns, weights


def _fit(mapped: npt.NDArray[np.int64], source: ModelSpace, target: ModelSpace) -> Tensor:
    """A map over tokenizer ids cut or padded (with -1) to the heads' numbers of rows."""
    fitted = torch.full((source.vocab_size,), -1)
    values = torch.from_numpy(mapped)[: source.vocab_size]
    fitted[: len(values)] = values.masked_fill(values >= target.vocab_size, -1)
    return fitted


def _keys(space: ModelSpace) -> list[bytes | None]:
    """Bytes of each row of the head; None for special tokens (but the end) and unused rows."""
    keys = vocabulary_bytes(space.tokenizer)[: space.vocab_size]
    keys += [None] * (space.vocab_size - len(keys))
    end = space.tokenizer.eos_token_id
    if end is not None and end < len(keys):
        keys[end] = _END.encode()
    return keys


def _tensor(values: list[int], space: ModelSpace) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=space.head.weight.device)


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
