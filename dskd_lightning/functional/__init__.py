"""Pure mathematics: divergences, and heads met with losses in chunks of tokens."""

from dskd_lightning.functional.divergences import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    TotalVariation,
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)
from dskd_lightning.functional.fused_linear import chunk_tokens, chunked_map, chunked_sum, token_log_prob

__all__ = [
    "AdaptiveKL",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "ReverseKL",
    "SkewedForwardKL",
    "SkewedReverseKL",
    "TotalVariation",
    "adaptive_kl",
    "chunk_tokens",
    "chunked_map",
    "chunked_sum",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "token_log_prob",
    "total_variation",
]
