"""Projections of hidden states between a student's and a teacher's space."""

from dskd_lightning.projection.head_map import HeadMap
from dskd_lightning.projection.linear import LinearProjector
from dskd_lightning.projection.pseudo_inverse import cross_gram, inverse_gram, map_between_heads

__all__ = ["HeadMap", "LinearProjector", "cross_gram", "inverse_gram", "map_between_heads"]
