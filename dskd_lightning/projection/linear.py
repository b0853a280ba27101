"""Trainable projections of hidden states from one model's space into another's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from dskd_lightning.projection.pseudo_inverse import map_between_heads
from dskd_lightning.ranks import sum_over_ranks, whole
from dskd_lightning.structures import Head

__all__ = ["LinearProjector"]

_FLOOR = 1e-3
"""Least RMS of a dimension as a share of the mean: one that is hardly ever on isn't blown up."""


class LinearProjector(nn.Linear):
    """``P: in_features -> out_features``, its parameters in float32 whatever reads it.

    Hidden states of real models have dimensions twenty times larger than the others, and Adam moves every
    weight by about the learning rate, whatever it multiplies. With ``scale_inputs`` each dimension
    is divided by its root mean square, so that one learning rate holds for every model; the weight is
    multiplied with it in turn, and what the projector gives at first stays as it was.

    The root mean square is measured once, in training: over the first batch or, where `measure_whole_step`
    was called before, over what passes until `settle`.

    Args:
        in_features: hidden size of the space to leave.
        out_features: hidden size of the space to reach.
        bias: add a bias.
        device: where the parameters are made.
        dtype: of the parameters.
        scale_inputs: divide the input by its root mean square.

    Attributes:
        input_rms: ``[in_features]``, 0 until it is measured; saved with the weights. None without scaling.
    """

    input_rms: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        scale_inputs: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        rms = torch.zeros(in_features, device=device) if scale_inputs else None
        self.register_buffer("input_rms", rms)
        self._waits: bool | None = None  # what `input_rms` says, asked once: it may be on a device
        self._whole_step = False
        self._squares: Tensor | None = None  # [in_features + 1], sums of squares and number of rows
        self.register_load_state_dict_post_hook(_forget_measured)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[tokens, in_features]`` in any dtype to ``[tokens, out_features]``."""
        if self.waits and self.training and torch.is_grad_enabled():
            self._measure(hidden.detach())
        matrix = self.matrix.to(self.weight.dtype)
        return F.linear(hidden.to(matrix.dtype), matrix, self.bias)

    @property
    def matrix(self) -> Tensor:
        """``[out_features, in_features]``, what hidden states are multiplied with, scaling included."""
        if self.input_rms is None or self.waits:
            return self.weight
        return whole(self.weight) / self.input_rms

    @property
    def waits(self) -> bool:
        """Whether the input is still to be measured."""
        if self._waits is None:
            self._waits = self.input_rms is not None and not bool(self.input_rms.any())
        return self._waits

    def measure_whole_step(self) -> None:
        """Measure until `settle`: the same for any number of micro-batches and ranks."""
        self._whole_step = True

    @torch.no_grad()
    def settle(self) -> None:
        """Take what was measured, on all ranks; called after the first backward, before the optimiser's step.

        The gradient of the weight becomes that of the weight times ``input_rms``.
        """
        if not self.waits or self.input_rms is None:
            return
        sums = self.input_rms.new_zeros(self.in_features + 1) if self._squares is None else self._squares
        self._squares = None
        if not sum_over_ranks(sums)[-1] > 0:
            return
        rms = (sums[:-1] / sums[-1]).sqrt()
        rms = rms.clamp(min=_FLOOR * rms.mean())
        self.input_rms.copy_(rms.where(rms > 0, 1.0))
        _local(self.weight).mul_(self.input_rms)
        if self.weight.grad is not None:
            _local(self.weight.grad).div_(self.input_rms)
        self._waits = False

    @torch.no_grad()
    def _measure(self, hidden: Tensor) -> None:
        rows = hidden.flatten(0, -2).float()
        sums = torch.cat([rows.square().sum(0), rows.new_full((1,), len(rows))])
        self._squares = sums if self._squares is None else self._squares + sums
        if not self._whole_step:
            self.settle()

    @classmethod
    def between_heads(
        cls,
        source: Head,
        target: Head,
        source_tokens: Tensor | slice = slice(None),
        target_tokens: Tensor | slice = slice(None),
        *,
        scale_inputs: bool = False,
    ) -> LinearProjector:
        """A projector without bias whose output the target head reads as the source head read the input.

        The least-squares solution ``T S^+`` of DSKD v2 (arXiv 2504.11426) with ``T`` the source's
        and ``S`` the target's head, both restricted to tokens that mean the same.

        Args:
            source: head of the space to leave, ``[vocab, in_features]``.
            target: head of the space to reach, ``[target_vocab, out_features]``.
            source_tokens: ids in the source's vocabulary.
            target_tokens: the same tokens' ids in the target's vocabulary.
            scale_inputs: see `LinearProjector`.
        """
        with torch.no_grad():
            found = map_between_heads(source.weight[source_tokens], target.weight[target_tokens])
            found = found * (source.scale / target.scale)
            dtype = torch.promote_types(target.weight.dtype, torch.float32)
            inner, outer = found.shape
            projector = cls(inner, outer, False, source.weight.device, dtype, scale_inputs)
            projector.weight.copy_(found.T)
        return projector


def _local(weight: Tensor) -> Tensor:
    """The rows that this rank holds of a weight that may be sharded by its rows."""
    return weight.to_local() if isinstance(weight, DTensor) else weight.detach()


def _forget_measured(projector: LinearProjector, _: Any) -> None:
    projector._waits = None
