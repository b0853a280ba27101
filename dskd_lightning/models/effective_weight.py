"""The weight that a layer really applies, with its peft adapters."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from dskd_lightning.errors import UserError

__all__ = ["effective_bias", "effective_weight"]


def effective_weight(module: nn.Module) -> Tensor:
    """``[vocab, hidden]`` of a head or an embedding: ``W`` or, under LoRA, ``W + scaling * B @ A``.

    Gradients reach whatever is trainable in it. Dropout of an adapter on this layer has no
    place in one matrix and is left out.

    Raises:
        UserError: the adapter isn't an added matrix (DoRA and its like).
    """
    if isinstance(module, ModulesToSaveWrapper):
        return effective_weight(_active(module))
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter.get_merged_weights(module.active_adapters)
    if not isinstance(module, BaseTunerLayer):
        return module.weight  # type: ignore[return-value]
    weight = effective_weight(module.get_base_layer())
    if module.disable_adapters:
        return weight
    for name in module.active_adapters:
        if name in module.merged_adapters:
            continue
        if not isinstance(module, LoraLayer) or name in module.lora_variant:
            raise UserError(
                f"The adapter '{name}' on the head or the embeddings is no plain LoRA: leave these layers "
                "out of `lora.targets`, train them whole (`lora.config.modules_to_save`) or use plain LoRA."
            )
        if name in module.scaling:
            weight = weight + module.get_delta_weight(name).to(weight.dtype)
    return weight


def effective_bias(module: nn.Module) -> Tensor | None:
    """The bias ``[vocab]`` of a head, or None."""
    if isinstance(module, ModulesToSaveWrapper):
        return effective_bias(_active(module))
    if isinstance(module, TrainableTokensWrapper):
        return None
    if isinstance(module, BaseTunerLayer):
        return effective_bias(module.get_base_layer())
    return getattr(module, "bias", None)


def _active(module: ModulesToSaveWrapper) -> nn.Module:
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]
