"""Embeddings beside the input's that a model looks up by token id."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["replace_table", "token_tables"]


@torch.no_grad()
def token_tables(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """Embeddings beside the input's that are looked up by token id (Gemma's per-layer ones), by name."""
    if model.device.type == "meta":
        return {}
    own: Any = model.get_input_embeddings()
    ids = torch.tensor([[5, 2, 7, 3, 3]], device=model.device).remainder(own.weight.shape[0])
    found: dict[str, nn.Embedding] = {}

    def look(name: str, module: nn.Embedding) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and inputs[0].numel() == ids.numel() and torch.equal(inputs[0].flatten(), ids[0]):
                found[name] = module

        return module.register_forward_pre_hook(hook)

    hooks = [
        look(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not own
    ]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return found


def replace_table(model: PreTrainedModel, name: str, old_size: int, values: tuple[Tensor, bool]) -> None:
    """Give the table ``name`` the rows and trainability ``values``, and the config its new size."""
    table: Any = model.get_submodule(name)
    table.weight = nn.Parameter(values[0], requires_grad=values[1])
    table.num_embeddings = values[0].shape[0]
    config = model.config.get_text_config()
    for key, value in vars(config).items():
        if "vocab_size" in key and key != "vocab_size" and value == old_size:
            setattr(config, key, table.num_embeddings)
