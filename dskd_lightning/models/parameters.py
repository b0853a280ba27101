"""How many parameters a model has, where, and what they weigh."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel

from dskd_lightning.models.output import base_model

__all__ = ["ParameterCount", "parameter_report"]

_ADAPTER_MARKS = ("lora_", "modules_to_save", "trainable_tokens")


@dataclass
class ParameterCount:
    """Parameters of one part of a model.

    Args:
        trainable: number of trainable parameters.
        frozen: number of frozen ones.
        bytes: memory of both.
    """

    trainable: int = 0
    frozen: int = 0
    bytes: int = 0

    @property
    def total(self) -> int:
        return self.trainable + self.frozen


def parameter_report(model: PreTrainedModel | PeftModel) -> dict[str, ParameterCount]:
    """Counts of the parts ``embedding``, ``head``, ``adapter`` and ``rest``, and of the ``total``.

    Tied weights count once, as the embedding. Weights packed by a quantiser count as stored.
    """
    base = base_model(model)
    parts = {name: ParameterCount() for name in ("embedding", "head", "adapter", "rest", "total")}
    embedding = {id(parameter) for parameter in base.get_input_embeddings().parameters()}
    output = base.get_output_embeddings()
    head = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in _ADAPTER_MARKS):
            part = "adapter"
        elif id(parameter) in embedding:
            part = "embedding"
        else:
            part = "head" if id(parameter) in head else "rest"
        for count in (parts[part], parts["total"]):
            count.bytes += parameter.numel() * parameter.element_size()
            if parameter.requires_grad:
                count.trainable += parameter.numel()
            else:
                count.frozen += parameter.numel()
    return parts
