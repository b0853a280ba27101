"""Find the decoder layers of a model, the units in which it is sharded."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from dskd_lightning.errors import UserError
from dskd_lightning.models import output

__all__ = ["decoder_layers"]


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The decoder layers of every transformers model inside ``module``, in their order.

    A model without a decoder, such as the head of a teacher whose states are cached, has none.

    Raises:
        UserError: a model whose decoder isn't a list of layers.
    """
    layers: list[nn.Module] = []
    for model in _language_models(module):
        try:
            layers += output.decoder_layers(model)
        except UserError as error:
            raise UserError(f"{str(error)[:-1]} to shard by; take `trainer.strategy: ddp`.") from error
    return layers


def _language_models(module: nn.Module) -> list[PreTrainedModel]:
    """Outermost models that have a head; their decoders are models too."""
    found = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
    return [model for model in found if model.get_output_embeddings() is not None]
