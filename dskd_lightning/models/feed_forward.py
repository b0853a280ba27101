"""The feed-forward layers of a decoder: how wide they are, and which weights lead in and out of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dskd_lightning.errors import UserError
from dskd_lightning.models.output import decoder_layers

__all__ = [
    "check_narrowing",
    "feed_forward",
    "feed_forward_width",
    "outputs_of",
    "select_inputs",
    "select_outputs",
    "weight_of",
]

_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")


def feed_forward_width(model: PreTrainedModel) -> tuple[str, int]:
    """The key of the configuration that says how wide the feed-forward layers are, and what it says.

    Raises:
        UserError: there is no such key.
    """
    config = model.config.get_text_config()
    key = next((key for key in _WIDTH_KEYS if hasattr(config, key)), None)
    width = (getattr(config, key) or 4 * config.hidden_size) if key else None
    if key is None or not isinstance(width, int):
        raise UserError(f"`prune.intermediate_size`: {type(model).__name__} has no one feed-forward width.")
    return key, width


def check_narrowing(model: PreTrainedModel, width: int) -> tuple[str, int]:
    """What `feed_forward_width` says of a model whose feed-forward layers can be cut to ``width`` units.

    Raises:
        UserError: they aren't of a known kind, or not as wide.
    """
    key, old = feed_forward_width(model)
    if not 1 <= width <= old:
        raise UserError(f"`prune.intermediate_size: {width}` must lie between 1 and the model's {old}.")
    for layer in decoder_layers(model):
        if len(feed_forward(layer, old)[1]) != 1:
            raise UserError(
                f"`prune.intermediate_size`: no plain feed-forward layer of width {old} found in "
                f"{type(layer).__name__} (mixtures of experts aren't supported)."
            )
    return key, old


def feed_forward(layer: nn.Module, width: int) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
    """Linear layers into (gate and up, fused or not) and out of the ``width`` units of a layer."""
    for name, parent in layer.named_modules():
        if "attn" in name or "attention" in name:
            continue
        linear: list[nn.Module] = [
            child for child in parent.children() if isinstance(child, nn.Linear | Conv1D)
        ]
        inward = [child for child in linear if outputs_of(child) in (width, 2 * width)]
        reading = [child for child in linear if weight_of(child).shape[1] == width]
        outward = [child for child in reading if child not in inward] or reading[-1:]
        # Where both sizes are alike, the last of them leads out; `_check` sees it where that is wrong.
        inward = [child for child in inward if child not in outward]
        if inward and outward:
            return inward, outward
    return [], []


def weight_of(linear: nn.Module) -> Tensor:
    """A linear layer's weights ``[out, in]``; GPT-2's Conv1D stores the transpose."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if isinstance(linear, Conv1D) else weight


def outputs_of(linear: nn.Module) -> int:
    """How many values it gives."""
    return weight_of(linear).shape[0]


def select_outputs(linear: nn.Module, units: Tensor) -> None:
    """Keep those ``units`` that it gives, in place."""
    _replace(linear, weight_of(linear)[units])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[units])  # type: ignore[index]


def select_inputs(linear: nn.Module, units: Tensor) -> None:
    """Keep those ``units`` that it reads, in place."""
    _replace(linear, weight_of(linear)[:, units])


def _replace(linear: nn.Module, weight: Tensor) -> None:
    if isinstance(linear, Conv1D):
        linear.weight = nn.Parameter(weight.T.contiguous())
        linear.nx, linear.nf = linear.weight.shape
    else:
        linear.weight = nn.Parameter(weight.contiguous())
        linear.out_features, linear.in_features = weight.shape  # type: ignore[assignment]
