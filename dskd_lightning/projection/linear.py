"""Trainable projections of hidden states from one model's space into another's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dskd_lightning.projection.pseudo_inverse import map_between_heads
from dskd_lightning.structures import Head

__all__ = ["LinearProjector"]


class LinearProjector(nn.Linear):
    """``P: in_features -> out_features``, its parameters in float32 whatever reads it.

    Args:
        in_features: hidden size of the space to leave.
        out_features: hidden size of the space to reach.
        bias: add a bias.
        device: where the parameters are made.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[tokens, in_features]`` in any dtype to ``[tokens, out_features]``."""
        return super().forward(hidden.to(self.weight.dtype))

    @classmethod
    def between_heads(
        cls,
        source: Head,
        target: Head,
        source_tokens: Tensor | slice = slice(None),
        target_tokens: Tensor | slice = slice(None),
    ) -> LinearProjector:
        """A projector without bias whose output the target head reads as the source head read the input.

        The least-squares solution ``T S^+`` of DSKD v2 (arXiv 2504.11426) with ``T`` the source's
        and ``S`` the target's head, both restricted to tokens that mean the same.

        Args:
            source: head of the space to leave, ``[vocab, in_features]``.
            target: head of the space to reach, ``[target_vocab, out_features]``.
            source_tokens: ids in the source's vocabulary.
            target_tokens: the same tokens' ids in the target's vocabulary.
        """
        with torch.no_grad():
            matrix = map_between_heads(source.weight[source_tokens], target.weight[target_tokens])
            matrix = matrix * (source.scale / target.scale)
            dtype = torch.promote_types(target.weight.dtype, torch.float32)
            inner, outer = matrix.shape
            projector = cls(inner, outer, bias=False, device=source.weight.device, dtype=dtype)
            projector.weight.copy_(matrix.T)
        return projector
