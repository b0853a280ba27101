"""The untrained student-to-teacher projection of DSKD v2: a function of the present student head."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dskd_lightning.functional.precision import float64_place
from dskd_lightning.projection.pseudo_inverse import cross_gram, inverse_gram
from dskd_lightning.structures import Head

__all__ = ["HeadMap"]


class HeadMap(nn.Module):
    """``hidden -> hidden S T^+``, with ``S`` and ``T`` the source's and the target's head.

    What depends on the target alone is computed once; the map is formed again whenever the
    source's head has changed: never under a frozen head, once per optimiser step otherwise. No
    gradient flows through the map, and nothing of it enters a checkpoint.

    Args:
        target: head of the space to reach; frozen.
        source_tokens: ids of the shared tokens in the source's vocabulary.
        target_tokens: ids of the same tokens in the target's vocabulary.
    """

    def __init__(
        self,
        target: Head,
        source_tokens: Tensor | slice = slice(None),
        target_tokens: Tensor | slice = slice(None),
    ) -> None:
        super().__init__()
        self.source_tokens, self.target_tokens = source_tokens, target_tokens
        # Not a buffer: `module.to(torch.bfloat16)` would ruin it.
        self._inverse = inverse_gram(target.weight[target_tokens])
        self._map: Tensor | None = None
        self._made_of: tuple[weakref.ref[Tensor], int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None, "_made_of": None}  # weak references don't pickle

    def forward(self, hidden: Tensor, source: Head, target: Head) -> Tensor:
        """``[tokens, hidden]`` in the source's space to ``[tokens, target_hidden]``."""
        return hidden @ self.matrix(source, target).to(hidden.dtype)

    @torch.no_grad()
    def matrix(self, source: Head, target: Head) -> Tensor:
        """``S T^+`` ``[hidden, target_hidden]``, float32 or float64, for the heads as they are now."""
        if self._map is None or self._stale(source.weight):
            shared = cross_gram(
                source.weight.detach()[self.source_tokens], target.weight.detach()[self.target_tokens]
            )
            place = float64_place(shared.device)
            self._inverse = self._inverse.to(place)
            matrix = shared.to(place).double() @ self._inverse * (source.scale / target.scale)
            self._map = matrix.to(shared.dtype).to(shared.device)
            self._made_of = (
                weakref.ref(source.weight),
                source.weight._version,
                _optimizer_steps(source.weight),
            )
        return self._map

    def _stale(self, weight: Tensor) -> bool:
        if self._made_of is None:
            return True
        reference, *state = self._made_of
        return reference() is not weight or state != [weight._version, _optimizer_steps(weight)]


_steps = [0]


def _count_step(*_: Any) -> None:
    _steps[0] += 1


# 8-bit optimisers and sharded strategies write behind a tensor's version counter.
register_optimizer_step_post_hook(_count_step)


def _optimizer_steps(weight: Tensor) -> int:
    """How many steps any optimiser has made; none of them changes a frozen weight."""
    return _steps[0] if weight.requires_grad or weight.grad_fn is not None else 0
