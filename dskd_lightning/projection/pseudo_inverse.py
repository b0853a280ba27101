r"""Least-squares maps between two hidden spaces, through the heads that read them.

With heads ``A [vocab, a]`` and ``B [vocab, b]`` over the same tokens, the map that keeps logits is
:math:`A^T (B^T)^+ = (A^T B)(B^T B)^+`. The normal equations need only ``[a, b]`` and ``[b, b]``
matrices, summed over blocks of the vocabulary: no ``[vocab, vocab]`` or ``[vocab, hidden]``
pseudo-inverse is made. They square the condition number, so that ``B^T B`` and its pseudo-inverse
are float64, on the CPU where the device has none; directions whose singular value in ``B`` is below
1e-5 of the largest are dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_lightning.functional.precision import float64_place

__all__ = ["cross_gram", "inverse_gram", "map_between_heads"]

_BLOCK = 8192
_RTOL = 1e-10  # of eigenvalues, which are squared singular values


@torch.no_grad()
def cross_gram(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``a.T @ b`` ``[a_hidden, b_hidden]`` of ``[vocab, *]`` matrices, summed in ``dtype``.

    Args:
        a: ``[vocab, a_hidden]``, in any dtype, autocast or not.
        b: ``[vocab, b_hidden]``.
        dtype: of the sums; None takes float32, or float64 for float64 input.
    """
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"heads over {a.shape[0]} and {b.shape[0]} tokens: restrict them to shared tokens")
    if dtype is None:
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    place = float64_place(a.device) if dtype == torch.float64 else a.device
    total = torch.zeros(a.shape[1], b.shape[1], dtype=dtype, device=place)
    with torch.autocast(place.type, enabled=False):
        for left, right in zip(a.split(_BLOCK), b.split(_BLOCK), strict=True):
            # Moved first: the device that they leave may lack the dtype.
            total.addmm_(left.to(place).to(dtype).T, right.to(place).to(dtype))
    return total


@torch.no_grad()
def inverse_gram(weight: Tensor) -> Tensor:
    """``(W^T W)^+`` ``[hidden, hidden]`` of a head ``[vocab, hidden]``, in float64, at `float64_place`."""
    gram = cross_gram(weight, weight, torch.float64)
    return torch.linalg.pinv(gram, hermitian=True, rtol=_RTOL)


@torch.no_grad()
def map_between_heads(source: Tensor, target: Tensor) -> Tensor:
    """``T S^+`` ``[source_hidden, target_hidden]`` with ``T = source.T``, ``S = target.T``.

    Args:
        source: ``[tokens, source_hidden]``, rows of the source's head.
        target: ``[tokens, target_hidden]``, rows of the same tokens in the target's head.

    Returns:
        The map in float64 at the source's `float64_place`, to be multiplied from the right: ``hidden @ map``.
    """
    place = float64_place(source.device)
    return cross_gram(source, target).to(place).double() @ inverse_gram(target).to(place)
