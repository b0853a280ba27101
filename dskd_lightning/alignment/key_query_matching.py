"""Key-query matching on top of cross-model attention (DSKD-KQ, arXiv 2603.22056).

Attention aligns two tokenisations only as far as queries and keys live in one distribution.
Both ways here draw the projected queries towards the teacher's (frozen) keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dskd_lightning.alignment.cross_model_attention import AttentionMap
from dskd_lightning.described import Described

__all__ = ["AdversarialMatching", "ConditionalTransport", "KeyQueryMatching", "reverse_gradient"]


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * upstream[0], None


def reverse_gradient(values: Tensor, scale: float = 1.0) -> Tensor:
    """``values`` itself, with a gradient of ``-scale`` times the upstream one (arXiv 1409.7495)."""
    return cast("Tensor", _ReverseGradient.apply(values, scale))


class _Highway(nn.Module):
    """``sigmoid(g) relu(g) + (1 - sigmoid(g)) v`` with ``g = Linear(v)``, then two linear layers."""

    def __init__(self, size: int, width: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Linear(size, size)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(nn.Linear(size, width), nn.LeakyReLU(0.1), nn.Linear(width, outputs))

    def forward(self, values: Tensor) -> Tensor:
        gate = self.gate(values)
        share = gate.sigmoid()
        return cast("Tensor", self.layers(self.dropout(share * gate.relu() + (1 - share) * values)))


class KeyQueryMatching(Described, nn.Module):
    """A loss between the queries and the keys of an `AttentionMap`."""

    def configure(self, size: int) -> None:
        """Make the networks that read vectors of ``size``, twice the teacher's hidden size."""
        raise NotImplementedError

    def forward(self, attention: AttentionMap) -> tuple[Tensor, dict[str, tuple[Tensor, int]]]:
        """The loss, a sum over the student's positions, and ``{metric: (total, count)}``."""
        raise NotImplementedError


class AdversarialMatching(KeyQueryMatching):
    """A discriminator tells keys (real) from queries (fake); the query projection fools it.

    Binary cross-entropy, summed over keys and over queries. The queries enter through a gradient
    reversal, so that one backward pass trains the discriminator as on detached queries and sends
    ``P_query`` the opposite gradient. (The published code detaches the queries, which leaves
    ``P_query`` without any.)

    Args:
        width: size of the discriminator's hidden layer.
        dropout: after its highway layer.
        reversal: weight of the reversed gradient.
    """

    def __init__(self, width: int = 256, dropout: float = 0.1, reversal: float = 1.0) -> None:
        super().__init__()
        self.width = width
        self.dropout = dropout
        self.reversal = reversal
        self.discriminator: nn.Module

    def configure(self, size: int) -> None:
        self.discriminator = _Highway(size, self.width, 1, self.dropout)

    def forward(self, attention: AttentionMap) -> tuple[Tensor, dict[str, tuple[Tensor, int]]]:
        real = self.discriminator(attention.keys).squeeze(-1)
        fake = self.discriminator(reverse_gradient(attention.queries, self.reversal)).squeeze(-1)
        loss = F.softplus(-real).sum() + F.softplus(fake).sum()
        right = (real > 0).sum() + (fake <= 0).sum()
        return loss, {"discriminator_accuracy": (right, len(real) + len(fake))}


class ConditionalTransport(KeyQueryMatching):
    r"""Bidirectional conditional transport between queries and keys (arXiv 2012.14100).

    A critic :math:`c` gives the cost of moving a query to a key, the distance of their critic
    outputs; a navigator :math:`v` says where to move it,
    :math:`\pi(j | i) = softmax_j(v(q_i) \cdot v(k_j))` and likewise from keys to queries. Both
    networks end in L2 normalisation. The loss is half the expected cost in either direction, once
    between the positions of each example and once between feature dimensions, each described by
    its values over the example's positions, averaged into ``segments`` equal parts.

    As in the transport's own paper, navigators and queries make the cost small and critics make
    it large (their parameters' gradient is reversed): a minimising critic would be constant.

    Args:
        width: size of the networks' hidden layers.
        outputs: size of the networks' outputs.
        segments: values that describe a feature dimension; networks need a fixed number.
        features: also transport between feature dimensions, whose memory grows with their square.
    """

    def __init__(
        self, width: int = 256, outputs: int = 64, segments: int = 32, features: bool = True
    ) -> None:
        super().__init__()
        self.width = width
        self.outputs = outputs
        self.segments = segments
        self.features = features
        self.position_critic: nn.Module
        self.position_navigator: nn.Module
        self.feature_critic: nn.Module
        self.feature_navigator: nn.Module

    def configure(self, size: int) -> None:
        self.position_critic = _Highway(size, self.width, self.outputs)
        self.position_navigator = _Highway(size, self.width, self.outputs)
        if self.features:
            self.feature_critic = _Highway(self.segments, self.width, self.outputs)
            self.feature_navigator = _Highway(self.segments, self.width, self.outputs)

    def forward(self, attention: AttentionMap) -> tuple[Tensor, dict[str, tuple[Tensor, int]]]:
        positions, features = attention.queries.new_zeros(2)
        examples = list(_examples(attention))
        if not examples:  # every parameter has a gradient all the same, which other ranks wait for
            positions = positions + sum(0 * parameter.sum() for parameter in self.parameters())
        for queries, keys in examples:
            towards, back = _transport(queries, keys, self.position_critic, self.position_navigator)
            positions = positions + 0.5 * (towards.sum() + back.sum())
            if self.features:
                # Two matrices of 2D x 2D an example: not worth keeping for the backward pass.
                cost = checkpoint(self._feature_cost, queries, keys, use_reentrant=False)
                features = features + len(queries) * cast("Tensor", cost)
        count = len(attention.queries)
        metrics = {"position_transport": (positions.detach(), count)}
        if self.features:
            metrics["feature_transport"] = (features.detach(), count)
        return positions + features, metrics

    def _feature_cost(self, queries: Tensor, keys: Tensor) -> Tensor:
        described, wanted = (F.adaptive_avg_pool1d(side.T, self.segments) for side in (queries, keys))
        towards, back = _transport(described, wanted, self.feature_critic, self.feature_navigator)
        return 0.5 * (towards.mean() + back.mean())


def _examples(attention: AttentionMap) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys of each example that has both."""
    counts = [rows.counts.tolist() for rows in (attention.student, attention.teacher)]
    parts = zip(attention.queries.split(counts[0]), attention.keys.split(counts[1]), strict=True)
    return ((queries, keys) for queries, keys in parts if len(queries) and len(keys))


def _transport(
    queries: Tensor, keys: Tensor, critic: nn.Module, navigator: nn.Module
) -> tuple[Tensor, Tensor]:
    """Expected cost of moving each of ``[n, size]`` to ``[m, size]``, ``[n]``, and back, ``[m]``."""
    maximised = {name: reverse_gradient(value) for name, value in critic.named_parameters()}
    judged = [F.normalize(functional_call(critic, maximised, (side,)), dim=-1) for side in (queries, keys)]
    guided = [F.normalize(navigator(side), dim=-1) for side in (queries, keys)]
    cost = torch.cdist(judged[0], judged[1])
    affinity = guided[0] @ guided[1].T
    return (affinity.softmax(1) * cost).sum(1), (affinity.softmax(0) * cost).sum(0)
