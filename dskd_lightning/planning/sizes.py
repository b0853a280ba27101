"""How large a model is, without its weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from dskd_lightning.errors import UserError
from dskd_lightning.models.loading import load_config
from dskd_lightning.models.output import decoder_layers
from dskd_lightning.models.sources import load_errors
from dskd_lightning.models.spec import ModelSpec, StudentSpec
from dskd_lightning.models.tokenizer import load_tokenizer
from dskd_lightning.planning.calculator.shapes import ModelSize

__all__ = ["ModelSize", "model_size"]

_IN_A_LAYER = re.compile(r"\.\d+\.")
_DEFAULT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_KEPT = {"gelu_new": 5, "relu": 1}
"""Tensors that an activation without a gate leaves for its backward pass; a kernel of its own leaves two."""
_KEPT_GATED = 4


def model_size(spec: ModelSpec) -> ModelSize:
    """The sizes that ``spec`` will have, read off its configuration; no weight is loaded.

    Raises:
        UserError: the configuration can't be loaded, or is of no causal language model.
    """
    config: Any = load_config(spec)
    with load_errors("model", spec.source, "a folder needs a config.json"), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    text = config.get_text_config()
    layers, hidden = int(text.num_hidden_layers), int(text.hidden_size)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight or bool(getattr(config, "tie_word_embeddings", False))
    ends = {id(head.weight): head.weight.numel(), id(embedding.weight): embedding.weight.numel()}
    outer = max(ends.values()) if tied else sum(ends.values())
    inner = sum(p.numel() for p in model.parameters() if id(p) not in ends)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    vocabulary = int(head.weight.shape[0])
    layered = min(inner, sum(p.numel() for n, p in model.named_parameters() if _IN_A_LAYER.search(n)))
    shapes = _layer(model, text, linear)
    adapted = 0
    if isinstance(spec, StudentSpec):
        kept = spec.prune.layers if spec.prune is not None else None
        share = 1.0 if kept is None else (kept if isinstance(kept, int) else len(kept)) / layers
        if spec.prune is not None and spec.prune.intermediate_size is not None:
            wide, narrow = int(text.intermediate_size), spec.prune.intermediate_size
            cut = int(sum(m.weight.numel() for m in linear if wide in m.weight.shape) * (1 - narrow / wide))
            inner, layered = inner - cut, layered - cut
            shapes["wide"] = narrow
        inner, layered = int(inner - layered * (1 - share)), int(layered * share)
        layers = max(1, round(layers * share))
        if spec.tokenizer is not None:
            rows = len(load_tokenizer(spec))
            outer, vocabulary = outer // vocabulary * rows, rows
        if spec.lora is not None:
            adapted = int(spec.lora.rank * sum(sum(m.weight.shape) for m in linear) * share)
    return ModelSize(
        parameters=inner + outer + adapted,
        trained=_trained(spec, inner, outer, adapted),
        layers=layers,
        hidden=hidden,
        vocabulary=vocabulary,
        weight_bytes=_bytes(spec, config),
        layered=layered,
        adapted=adapted,
        offloaded=bool(getattr(spec, "offload", False)),
        **shapes,
    )


def _layer(model: Any, text: Any, linear: Sequence[nn.Module]) -> dict[str, Any]:
    """Widths within a decoder layer, read off the first one."""
    try:
        first = decoder_layers(model)[0]
    except UserError:  # no list of layers, as in models of mixed kinds: all of the model is looked at
        first = model
    products = [m for m in first.modules() if m in linear]
    shapes = [_outputs_and_inputs(m) for m in products]
    wide = max((inputs for _, inputs in shapes), default=4 * int(text.hidden_size))
    made = sum(outputs for outputs, _ in shapes if outputs in (wide, 2 * wide)) // wide
    name = str(getattr(text, "hidden_act", None) or getattr(text, "activation_function", None))
    heads = int(text.num_attention_heads)
    each = int(getattr(text, "head_dim", None) or int(text.hidden_size) // heads)
    norms = [type(m).__name__ for m in first.modules() if "norm" in type(m).__name__.lower()]
    return {
        "attention": heads * each,
        "keys": int(getattr(text, "num_key_value_heads", None) or heads) * each,
        "wide": wide,
        "kept": _KEPT_GATED if made > 1 else _KEPT.get(name, 2),
        "readers": max(1, len(shapes) - 2),  # all but what attention and the activation are followed by
        "rms": any("RMS" in norm for norm in norms),
    }


def _outputs_and_inputs(product: Any) -> tuple[int, int]:
    first, second = product.weight.shape
    return (second, first) if isinstance(product, Conv1D) else (first, second)


def _trained(spec: ModelSpec, inner: int, outer: int, adapted: int) -> int:
    if not isinstance(spec, StudentSpec):
        return 0
    if spec.lora is not None:
        return adapted
    return inner if spec.freeze_embeddings else inner + outer


def _bytes(spec: ModelSpec, config: Any) -> float:
    quantised = {"4bit": 0.55, "8bit": 1.05}.get(getattr(spec, "quantization", None) or "")
    if quantised is not None:
        return quantised
    name: str = spec.dtype
    if name == "auto":  # of a checkpoint that doesn't say, float32
        name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return float(_DEFAULT_BYTES.get(name, 4))
