"""Hidden states as stored tensors and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.models.teacher_cache_settings import CacheDtype

__all__ = ["bytes_per_token", "decode", "encode"]

_PLAIN = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
_SCALED = {"float8_e4m3": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}


def bytes_per_token(hidden_size: int, dtype: CacheDtype) -> int:
    """Bytes that one position takes on the disk."""
    if dtype in _PLAIN:
        return hidden_size * _PLAIN[dtype].itemsize
    return hidden_size + torch.float32.itemsize


def encode(hidden: Tensor, dtype: CacheDtype) -> dict[str, Tensor]:
    """Tensors that `decode` reads.

    Args:
        hidden: ``[n, hidden]``.
        dtype: a plain type, or one with a scale for each row, which its largest value sets.

    Raises:
        UserError: a value is not finite, or too large for the type.
    """
    if dtype in _PLAIN:
        stored = {"hidden": hidden.to(_PLAIN[dtype])}
    else:
        kind, largest = _SCALED[dtype]
        scale = (hidden.float().abs().amax(dim=1) / largest).clamp(min=torch.finfo(torch.float32).tiny)
        scaled = hidden.float() / scale[:, None]
        stored = {"hidden": (scaled.round() if dtype == "int8" else scaled).to(kind), "scale": scale}
    if not torch.isfinite(stored.get("scale", stored["hidden"])).all():
        raise UserError(
            f"`teacher_cache.dtype: {dtype}` can't hold the teacher's hidden states, the largest of which is "
            f"{hidden.abs().max().item():g}: use bfloat16 or float32, or check the teacher's weights."
        )
    return stored


def decode(stored: Mapping[str, Tensor], rows: slice, dtype: torch.dtype) -> Tensor:
    """``[rows, hidden]`` in ``dtype``, in memory of its own."""
    hidden = stored["hidden"][rows]
    if "scale" in stored:
        return (hidden.float() * stored["scale"][rows, None]).to(dtype)
    return hidden.clone() if hidden.dtype == dtype else hidden.to(dtype)
