"""Load models from what a config says of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dskd_lightning.errors import UserError
from dskd_lightning.models.offload import offload_layers
from dskd_lightning.models.sources import Source, adapter_base, load_errors, quiet, resolve_source
from dskd_lightning.models.tokenizer import load_tokenizer
from dskd_lightning.models.verification import verify_causal, verify_head

if TYPE_CHECKING:
    from dskd_lightning.models.spec import ModelSpec, TeacherSpec

__all__ = ["load_config", "load_model", "load_teacher", "load_tokenizer"]

_ADAPTER_NEEDS = "a folder needs peft's adapter_config.json and weights"
_NEEDS = "a folder needs a config.json and its weights, as `save_pretrained` writes them"


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """The model configuration of ``spec``, without its weights.

    Raises:
        UserError: nothing can be loaded from the source.
    """
    source = resolve_source(spec.source)
    if base := adapter_base(source):
        return load_config(_of_base(spec, base))
    with load_errors("model", spec.source, _NEEDS):
        return AutoConfig.from_pretrained(source.location, **_hub(spec))


def load_model(spec: ModelSpec, *, quantization: str | None = None) -> PreTrainedModel:
    """The causal language model of ``spec``, in eval mode, with plain trainable weights.

    GGUF blocks are dequantised (``dtype: auto`` then means float32), so that heads,
    pruning, adapters and export see ordinary ``nn.Linear`` weights.

    Args:
        spec: where the model comes from.
        quantization: ``8bit`` or ``4bit`` through bitsandbytes, for a frozen model.

    Raises:
        UserError: the source can't be loaded, lacks weights, or can't be quantised here.
    """
    source = resolve_source(spec.source)
    if base := adapter_base(source):
        return _with_adapter(spec, base, quantization)
    arguments: dict[str, Any] = {"dtype": _dtype(spec), **_hub(spec)}
    if spec.attn_implementation is not None:
        arguments["attn_implementation"] = spec.attn_implementation
    if quantization is not None:
        arguments |= _bitsandbytes(spec, source, quantization)
    with load_errors("model", spec.source, _NEEDS), quiet(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location, output_loading_info=True, **arguments
        )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"The checkpoint '{spec.source}' lacks {len(missing)} weights of a {type(model).__name__} "
            f"(first: {missing[0]}), which would stay random: give a complete causal language model."
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # by transformers, from the Hub
        raise UserError(
            f"'{spec.source}' is an adapter, no whole model: download it and give the folder, or give its "
            "base as `source` (a teacher takes the adapter as `adapter`)."
        )
    if source.gguf is not None:
        model.name_or_path = model.config.name_or_path = ""  # a cache folder is no address to export
    return model.eval()


def _with_adapter(spec: ModelSpec, base: str, quantization: str | None) -> PreTrainedModel:
    """The model of a folder that holds an adapter alone, merged: it trains and exports like any other."""
    if quantization is not None:
        raise UserError(
            f"'{spec.source}' is an adapter, which merging into quantised weights would round away: give "
            f"'{base}' as `source` and the folder as `adapter`."
        )
    model: Any = load_model(_of_base(spec, base))
    with load_errors("adapter", spec.source, _ADAPTER_NEEDS):
        model = PeftModel.from_pretrained(model, resolve_source(spec.source).location).merge_and_unload()
    model.name_or_path = model.config.name_or_path = ""  # what that name loads lacks the adapter
    return model.requires_grad_(True).eval()


def _of_base(spec: ModelSpec, base: str) -> ModelSpec:
    return dataclasses.replace(spec, source=base, revision=None)


def load_teacher(spec: TeacherSpec) -> PreTrainedModel:
    """A frozen teacher in eval mode, its adapter merged into the weights.

    A quantised teacher keeps its adapter beside the weights: merging would round it away.

    Raises:
        UserError: model or adapter can't be loaded, the model's head can't be read, or its weights stay on
            the device and shall not.
    """
    if spec.offload and spec.quantization:
        raise UserError(
            "model.teacher.offload: quantised weights stay on their device; leave offload or quantization "
            "out."
        )
    if not spec.offload:
        return _frozen(spec)
    device = torch.get_default_device()  # a strategy's context names one, which the model needn't fit
    with torch.device("cpu"):
        model: Any = _frozen(spec)
    offload_layers(model)
    return cast("PreTrainedModel", model.to(device))


def _frozen(spec: TeacherSpec) -> PreTrainedModel:
    model: Any = load_model(spec, quantization=spec.quantization)
    if spec.adapter is not None:
        with load_errors("adapter", spec.adapter, _ADAPTER_NEEDS):
            adapted = PeftModel.from_pretrained(model, spec.adapter)
            model = adapted.get_base_model() if spec.quantization else adapted.merge_and_unload()
    model.requires_grad_(False).eval()
    verify_causal(model, spec.source)
    verify_head(model, spec.source)
    return model


def _hub(spec: ModelSpec) -> dict[str, Any]:
    return {"revision": spec.revision or "main", "trust_remote_code": spec.trust_remote_code}


def _dtype(spec: ModelSpec) -> str | torch.dtype:
    return "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)


def _bitsandbytes(spec: ModelSpec, source: Source, quantization: str) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    if quantization not in ("8bit", "4bit"):
        raise UserError(f"`quantization: {quantization}` is unknown: choose 8bit, 4bit or null.")
    if source.gguf is not None:
        raise UserError(
            f"`quantization: {quantization}` cannot apply to the GGUF file '{spec.source}', which is loaded "
            "dequantised: drop `quantization`, or give the original folder or Hub id."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"`quantization: {quantization}` needs bitsandbytes: pip install bitsandbytes.")
    # It warns at every product that a bfloat16 input is cast to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    compute = torch.bfloat16 if spec.dtype == "auto" else getattr(torch, spec.dtype)
    config = BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}
