"""Hidden states as stored tensors and back.

Hidden states have a few dimensions far from zero that are tens of times larger than the rest. ``int8`` and
``int4`` therefore store each dimension's distance from its mean over the shard, in its standard deviations:
what is left is nearly normal, and a row (``int8``) or 64 neighbours of a row (``int4``) share one scale.
Both statistics lie in the shard, so that no shard depends on another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dskd_lightning.errors import UserError
from dskd_lightning.models.teacher_cache_settings import CacheDtype

__all__ = ["bytes_per_token", "decode", "encode", "format_version", "stored_width"]

_PLAIN = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
_GROUP = 64
_LEVELS = 127
_ROWS = 4096  # in float32 at a time
_SMALLEST = {kind: torch.finfo(kind).tiny for kind in (torch.float16, torch.float32)}


def format_version(dtype: CacheDtype) -> str:
    """Changes with the bytes that `encode` makes of the same states."""
    return "1" if dtype in _PLAIN else "2"


def stored_width(hidden_size: int, dtype: CacheDtype) -> int:
    """Columns of the stored tensor ``hidden``; two values share a byte of ``int4``."""
    return -(-hidden_size // 2) if dtype == "int4" else hidden_size


def bytes_per_token(hidden_size: int, dtype: CacheDtype) -> int:
    """Bytes that one position takes on the disk, beside the two statistics of a shard."""
    if dtype in _PLAIN:
        return hidden_size * _PLAIN[dtype].itemsize
    scales = -(-hidden_size // _GROUP) * 2 if dtype == "int4" else 4
    return stored_width(hidden_size, dtype) + scales


def encode(hidden: Tensor, dtype: CacheDtype) -> dict[str, Tensor]:
    """Tensors that `decode` reads.

    Args:
        hidden: ``[n, hidden]``.
        dtype: a plain type, or ``int8`` or ``int4``.

    Raises:
        UserError: a value is not finite, or too large for the type.
    """
    if dtype in _PLAIN:
        stored = {"hidden": hidden.to(_PLAIN[dtype])}
    else:
        mean, deviation = _statistics(hidden)
        blocks = [_QUANTIZE[dtype]((rows.float() - mean) / deviation) for rows in hidden.split(_ROWS)]
        codes, scale = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        stored = {"hidden": codes, "scale": scale, "mean": mean, "deviation": deviation}
    if not all(torch.isfinite(tensor).all() for tensor in stored.values()):
        raise UserError(
            f"`teacher_cache.dtype: {dtype}` can't hold the teacher's hidden states, the largest of which is "
            f"{hidden.abs().max().item():g}: use bfloat16 or float32, or check the teacher's weights."
        )
    return stored


def decode(stored: Mapping[str, Tensor], rows: slice, dtype: torch.dtype) -> Tensor:
    """``[rows, hidden]`` in ``dtype``, in memory of its own."""
    hidden = stored["hidden"][rows]
    if "scale" in stored:
        mean = stored["mean"]
        values = _dequantize(hidden, stored["scale"][rows], len(mean))
        return (values * stored["deviation"] + mean).to(dtype)
    return hidden.clone() if hidden.dtype == dtype else hidden.to(dtype)


def _statistics(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[hidden]`` over rows; 1 for a dimension that doesn't vary."""
    rows = max(len(hidden), 1)
    mean = sum((part.float().sum(dim=0) for part in hidden.split(_ROWS)), torch.zeros(())) / rows
    square = sum(((p.float() - mean).square().sum(dim=0) for p in hidden.split(_ROWS)), torch.zeros(()))
    return mean, torch.where(square > 0, (square / rows).sqrt(), 1.0)


def _int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Whole steps ``[n, hidden]`` and the size of each row's step ``[n]``."""
    scale = (values.abs().amax(dim=1) / _LEVELS).clamp(min=_SMALLEST[torch.float32])
    return (values / scale[:, None]).round().to(torch.int8), scale


def _int4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers of levels a byte ``[n, hidden / 2]``, and each group's largest value ``[n, groups]``."""
    width = values.shape[1]
    groups = F.pad(values, (0, -width % _GROUP)).unflatten(1, (-(-width // _GROUP), _GROUP))
    scale = groups.abs().amax(dim=-1).half().clamp(min=_SMALLEST[torch.float16])
    levels = _normal_levels()
    bounds = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(groups / scale[..., None].float(), bounds).to(torch.uint8).flatten(1)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed[:, : -(-width // 2)].contiguous(), scale


_QUANTIZE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"int8": _int8, "int4": _int4}


def _dequantize(codes: Tensor, scale: Tensor, width: int) -> Tensor:
    """``[n, width]``, in deviations from the mean."""
    if codes.dtype == torch.int8:
        return codes.float() * scale[:, None]
    groups = scale.shape[1]
    padded = F.pad(codes, (0, groups * _GROUP // 2 - codes.shape[1]))
    values = F.embedding(padded.int(), _pairs_of_levels()).view(len(codes), groups, _GROUP)
    return (values * scale[..., None].float()).flatten(1)[:, :width]


@cache
def _pairs_of_levels() -> Tensor:
    """``[256, 2]``, what a byte of `_int4` says."""
    levels, numbers = _normal_levels(), torch.arange(256)
    return torch.stack((levels[numbers & 15], levels[numbers >> 4]), dim=-1)


@cache
def _normal_levels() -> Tensor:
    """``[16]`` values of -1 to 1 that a normal variable takes about equally often, 0 among them.

    NormalFloat of QLoRA (arXiv 2305.14314, equation 4): quantiles of the negative and of the positive half.
    """
    outermost = (1 / 32 + 1 / 30) / 2  # of the two halves' first quantiles, the mean
    positive = torch.special.ndtri(torch.linspace(1 - outermost, 0.5, 9, dtype=torch.float64))
    negative = -torch.special.ndtri(torch.linspace(1 - outermost, 0.5, 8, dtype=torch.float64))
    levels = torch.cat((negative[:-1], positive)).sort().values
    return (levels / levels.abs().max()).float()
