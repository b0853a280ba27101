"""Load models and tokenizers from what a config says of them."""

from __future__ import annotations

from dskd_lightning.models.tokenizer import load_tokenizer

__all__ = ["load_tokenizer"]
