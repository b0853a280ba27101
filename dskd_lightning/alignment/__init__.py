"""How the tokens of two tokenizers meet: byte-exact groups, soft attention, vocabulary maps."""

from dskd_lightning.alignment.byte_spans import (
    ByteSpans,
    batch_byte_spans,
    response_byte_spans,
    token_byte_spans,
)
from dskd_lightning.alignment.cross_model_attention import AttentionMap, CrossModelAttention
from dskd_lightning.alignment.exact import ExampleAlignment, align, align_many, batch_alignments
from dskd_lightning.alignment.key_query_matching import (
    AdversarialMatching,
    ConditionalTransport,
    KeyQueryMatching,
)
from dskd_lightning.alignment.min_edit import align_tokens
from dskd_lightning.alignment.nearest import nearest_token_map
from dskd_lightning.alignment.token_bytes import TokenBytes, token_bytes
from dskd_lightning.alignment.vocabulary import (
    SparseProjection,
    exact_token_map,
    token_projection,
    vocabulary_bytes,
)

__all__ = [
    "AdversarialMatching",
    "AttentionMap",
    "ByteSpans",
    "ConditionalTransport",
    "CrossModelAttention",
    "ExampleAlignment",
    "KeyQueryMatching",
    "SparseProjection",
    "TokenBytes",
    "align",
    "align_many",
    "align_tokens",
    "batch_alignments",
    "batch_byte_spans",
    "exact_token_map",
    "nearest_token_map",
    "response_byte_spans",
    "token_byte_spans",
    "token_bytes",
    "token_projection",
    "vocabulary_bytes",
]
