"""A student as one GGUF file, for programs on laptops and phones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dskd_lightning.errors import UserError
from dskd_lightning.files import replacing
from dskd_lightning.generation.stop_tokens import stop_token_ids
from dskd_lightning.models.export import merged
from dskd_lightning.tokenizers import backend_config

__all__ = ["write_gguf"]

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_ELSEWHERE = "export a folder, and convert it with llama.cpp's convert_hf_to_gguf.py"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def write_gguf(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast, path: str | Path
) -> Path:
    """Weights in float16 (norms in float32), vocabulary, merges, chat template and end of turn in one file.

    Args:
        model: the student; adapters are merged in a copy.
        tokenizer: its tokenizer, byte-level BPE.
        path: of the file.

    Raises:
        UserError: the package gguf is missing, the model's or the tokenizer's kind can't be written, or the
            file can't.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("--gguf needs the package gguf: pip install 'dskd-lightning[gguf]'.") from None
    model = merged(model) if isinstance(model, PeftModel) else model
    config: Any = model.config
    kind = str(config.model_type)
    if kind not in _ARCHITECTURES:
        raise UserError(
            f"--gguf: a {kind} model can't be written, only {', '.join(sorted(_ARCHITECTURES))}: "
            f"{_ELSEWHERE}."
        )
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"--gguf: rope scaling of type {rope['rope_type']} can't be written: {_ELSEWHERE}.")
    architecture = _ARCHITECTURES[kind]
    tokens, cut = _vocabulary(tokenizer, int(config.vocab_size)), _cut(tokenizer)
    path = Path(path).expanduser()
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), architecture)
        _add_sizes(writer, config, rope)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        _add_tokenizer(writer, model, tokenizer, tokens, cut)
        _add_weights(writer, gguf, model, architecture)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _add_sizes(writer: Any, config: Any, rope: dict[str, Any]) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10_000.0))))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _vocabulary(tokenizer: PreTrainedTokenizerFast, rows: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and the merges."""
    backend = backend_config(tokenizer)
    model = backend["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UserError(f"--gguf: only tokenizers of byte-level BPE can be written: {_ELSEWHERE}.")
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added = {entry["id"]: bool(entry["special"]) for entry in backend.get("added_tokens", ())}
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(rows)]
    kinds = [
        (_CONTROL if added[index] else _USER_DEFINED) if index in added else _NORMAL if index in texts else 5
        for index in range(rows)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]
    return tokens, kinds, merges


def _cut(tokenizer: PreTrainedTokenizerFast) -> str:
    """llama.cpp's name for how text is cut before merges, of which it knows a few only."""
    found = backend_config(tokenizer).get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    kinds = [part.get("type") for part in parts]
    pattern = "".join(str((part.get("pattern") or {}).get("Regex", "")) for part in parts)
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and pattern.startswith("(?i:'s|'t|'re|'ve|'m|'ll|'d)|"):
        if "|\\p{N}{1,3}|" in pattern:
            return "llama-bpe"
        if "|\\p{N}|" in pattern:
            return "qwen2"
    raise UserError(f"--gguf: llama.cpp's name for how this tokenizer cuts text isn't known: {_ELSEWHERE}.")


def _add_tokenizer(
    writer: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    vocabulary: tuple[list[str], list[int], list[str]],
    pre: str,
) -> None:
    tokens, kinds, merges = vocabulary
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    ends = stop_token_ids(model, tokenizer)
    add: dict[Callable[[int], None], int | None] = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: ends[0] if ends else tokenizer.eos_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for method, index in add.items():
        if index is not None:
            method(int(index))
    bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and bos)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_weights(writer: Any, gguf: Any, model: PreTrainedModel, architecture: str) -> None:
    names = gguf.get_tensor_name_map(
        {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture],
        model.config.num_hidden_layers,
    )
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]
    for name, weight in model.state_dict().items():
        if tied and weight.data_ptr() == model.get_input_embeddings().weight.data_ptr() and "head" in name:  # type: ignore[operator]
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UserError(f"--gguf: there is no name for the weights {name}: export a folder instead.")
        value = weight.detach().float().cpu()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            config: Any = model.config
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = _permuted(value, heads)
        kept = value.numpy() if value.ndim == 1 else value.to(torch.float16).numpy()
        writer.add_tensor(target, kept)


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp rotates them: in pairs beside each other, not in halves."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape).contiguous()
