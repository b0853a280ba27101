"""Tiny models of many families, and token batches for them."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from dskd_lightning.structures import TokenBatch

VOCAB = 97
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHORT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, **_IDS}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_COMMON),
    "llama_tied": LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=4, n_head=2, n_positions=64, n_inner=40, **_IDS),
    "gemma2": Gemma2Config(**_COMMON, head_dim=8, final_logit_softcapping=2.0, sliding_window=4),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON, head_dim=8),
    "mistral": MistralConfig(**_COMMON, sliding_window=4),
    "cohere": CohereConfig(**_COMMON, logit_scale=0.25),
    "granite": GraniteConfig(**_COMMON, logits_scaling=4.0),
    "smollm3": SmolLM3Config(**_COMMON),
    "phi": PhiConfig(**(_COMMON | {"num_key_value_heads": 2})),
    "phi3": Phi3Config(**_COMMON),
    "gpt_neox": GPTNeoXConfig(vocab_size=VOCAB, intermediate_size=40, max_position_embeddings=64, **_SHORT),
    "opt": OPTConfig(
        vocab_size=VOCAB, ffn_dim=40, max_position_embeddings=64, word_embed_proj_dim=8, **_SHORT
    ),
}
BLOOM = BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2, **_IDS)
NOT_PACKABLE = ("opt",)
LENGTHS = (9, 5)


def family(name: str, seed: int = 0) -> PreTrainedModel:
    """A model with weights large enough that every part shows in its logits."""
    return from_config(CONFIGS[name], seed)


def from_config(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def separate_rows(vocab: int = VOCAB) -> TokenBatch:
    """Two examples of 9 and 5 tokens, right-padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (2, LENGTHS[0]), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, LENGTHS[1] :] = 0
    response = mask.flatten().nonzero()[:, 0]
    positions = torch.arange(LENGTHS[0]).expand(2, -1)
    return TokenBatch(ids, ids.roll(-1, 1), mask, positions, response, response // LENGTHS[0])


def packed_row(vocab: int = VOCAB) -> TokenBatch:
    """The same two examples in one row."""
    rows = separate_rows(vocab)
    ids = rows.select(rows.input_ids)[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    labels = rows.select(rows.labels)[None]
    return TokenBatch(ids, labels, None, positions, torch.arange(ids.numel()), rows.sequence)
