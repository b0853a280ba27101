"""A smaller student cut out of a model: fewer decoder layers, narrower feed-forward layers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dskd_lightning.errors import UserError
from dskd_lightning.models.output import decoder_hidden, decoder_layers
from dskd_lightning.structures import TokenBatch

if TYPE_CHECKING:
    from dskd_lightning.models.spec import PruneSpec

__all__ = ["evenly_spaced", "prune", "prune_feed_forward", "prune_layers"]

_log = logging.getLogger(__name__)

_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")


def prune(model: PreTrainedModel, spec: PruneSpec, batches: Sequence[TokenBatch] = ()) -> PreTrainedModel:
    """A smaller copy of ``model``, as ``spec`` says; the model itself stays as it is.

    Args:
        model: a causal language model without adapters.
        spec: what to keep; a number of layers is spaced evenly here, see `decide_layers` for the others.
        batches: text on which feed-forward units are weighed by what they do.

    Raises:
        UserError: a number out of range, or an architecture that can't be cut this way.
    """
    if spec.layers is not None:
        total = model.config.get_text_config().num_hidden_layers
        keep = evenly_spaced(spec.layers, total) if isinstance(spec.layers, int) else spec.layers
        model = prune_layers(model, keep)
    if spec.intermediate_size is not None:
        model = prune_feed_forward(model, spec.intermediate_size, batches)
    return model


def evenly_spaced(count: int, total: int) -> list[int]:
    """``count`` of ``total`` indices, evenly spaced, first and last included.

    Raises:
        UserError: ``count`` isn't in ``1 .. total``.
    """
    if not 1 <= count <= total:
        raise UserError(f"`prune.layers: {count}` must lie between 1 and the model's {total} layers.")
    if count == 1:
        return [0]
    return [(2 * i * (total - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]


def prune_layers(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """A copy of ``model`` with the decoder layers ``keep`` only, renumbered from 0.

    Everything else is copied too, so that the model (a teacher, say) can go on being used.

    Args:
        model: a causal language model without adapters.
        keep: indices of the layers to keep, ascending.

    Raises:
        UserError: an index is wrong, or the architecture's configuration can't describe the result.
    """
    layers = decoder_layers(model)
    keep = list(keep)
    if not keep or keep != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= len(layers):
        raise UserError(
            f"`prune.layers: {keep}` must be ascending indices between 0 and {len(layers) - 1}, each once."
        )
    memo: dict[int, Any] = {}
    kept = nn.ModuleList(copy.deepcopy(layers[index], memo) for index in keep)
    memo[id(layers)] = kept
    pruned = copy.deepcopy(model, memo)
    for position, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = position  # type: ignore[assignment]
    config = pruned.config.get_text_config()
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list | tuple) and len(value) == len(layers):
            setattr(config, key, [value[index] for index in keep])
    config.num_hidden_layers = len(keep)
    _check(pruned)
    _log.info("Kept %d of %d decoder layers: %s.", len(keep), len(layers), keep)
    return pruned


@torch.no_grad()
def prune_feed_forward(
    model: PreTrainedModel, width: int, batches: Sequence[TokenBatch] = ()
) -> PreTrainedModel:
    """A copy of ``model`` with feed-forward layers of ``width`` units, those that matter most.

    With text, a unit's weight is the root mean square of what it gives times the norm of the weights
    that read it: the size of what it adds to the layer's output. Without, it is the norm of all weights
    into and out of it, gate included.

    Args:
        model: a causal language model without adapters.
        width: units to keep.
        batches: text, on the model's device.

    Raises:
        UserError: ``width`` isn't below the present one, or the layers aren't of a known kind.
    """
    config = model.config.get_text_config()
    key = next((key for key in _WIDTH_KEYS if hasattr(config, key)), None)
    old = (getattr(config, key) or 4 * config.hidden_size) if key else None
    if not isinstance(old, int):
        raise UserError(f"`prune.intermediate_size`: {type(model).__name__} has no one feed-forward width.")
    if not 1 <= width <= old:
        raise UserError(f"`prune.intermediate_size: {width}` must lie between 1 and the model's {old}.")
    model = copy.deepcopy(model)
    activity = _activity(model, old, batches) if batches else {}
    for layer in decoder_layers(model):
        inward, outward = _feed_forward(layer, old)
        if not inward or len(outward) != 1:
            raise UserError(
                f"`prune.intermediate_size`: no plain feed-forward layer of width {old} found in "
                f"{type(layer).__name__} (mixtures of experts aren't supported)."
            )
        matrices = [part for linear in inward for part in _weight(linear).split(old)]
        read = _weight(outward[0]).T.float().square().sum(1)
        if outward[0] in activity:
            scores = activity[outward[0]] * read
        else:
            scores = torch.stack([*(part.float().square().sum(1) for part in matrices), read]).sum(0)
        units = scores.topk(width).indices.sort().values
        for linear in inward:
            _select_outputs(linear, torch.cat([units + old * i for i in range(_outputs(linear) // old)]))
        _select_inputs(outward[0], units)
    setattr(model.config.get_text_config(), str(key), width)
    _check(model)
    _log.info("Kept %d of %d feed-forward units per layer.", width, old)
    return model


def _activity(model: PreTrainedModel, width: int, batches: Sequence[TokenBatch]) -> dict[nn.Module, Tensor]:
    """Sum of squares ``[width]`` of what each feed-forward layer's outgoing weights read."""
    sums: dict[nn.Module, Tensor] = {}
    real: Tensor | None = None

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].flatten(0, -2)  # some have put rows and positions together already
        values = values if real is None else values[real.flatten()]
        squares = values.float().square().sum(0)
        sums[module] = sums[module] + squares if module in sums else squares

    outward = [part for layer in decoder_layers(model) for part in _feed_forward(layer, width)[1][:1]]
    hooks = [module.register_forward_pre_hook(add) for module in outward]
    try:
        for batch in batches:
            real = None if batch.attention_mask is None else batch.attention_mask.bool()
            decoder_hidden(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return sums


def _feed_forward(layer: nn.Module, width: int) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
    """Linear layers into (gate and up, fused or not) and out of the ``width`` units of a layer."""
    for name, parent in layer.named_modules():
        if "attn" in name or "attention" in name:
            continue
        linear: list[nn.Module] = [
            child for child in parent.children() if isinstance(child, nn.Linear | Conv1D)
        ]
        inward = [child for child in linear if _outputs(child) in (width, 2 * width)]
        reading = [child for child in linear if _weight(child).shape[1] == width]
        outward = [child for child in reading if child not in inward] or reading[-1:]
        # Where both sizes are alike, the last of them leads out; `_check` sees it where that is wrong.
        inward = [child for child in inward if child not in outward]
        if inward and outward:
            return inward, outward
    return [], []


def _weight(linear: nn.Module) -> Tensor:
    """``[out, in]``; GPT-2's Conv1D stores the transpose."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if isinstance(linear, Conv1D) else weight


def _outputs(linear: nn.Module) -> int:
    return _weight(linear).shape[0]


def _select_outputs(linear: nn.Module, units: Tensor) -> None:
    _replace(linear, _weight(linear)[units])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[units])  # type: ignore[index]


def _select_inputs(linear: nn.Module, units: Tensor) -> None:
    _replace(linear, _weight(linear)[:, units])


def _replace(linear: nn.Module, weight: Tensor) -> None:
    if isinstance(linear, Conv1D):
        linear.weight = nn.Parameter(weight.T.contiguous())
        linear.nx, linear.nf = linear.weight.shape
    else:
        linear.weight = nn.Parameter(weight.contiguous())
        linear.out_features, linear.in_features = weight.shape  # type: ignore[assignment]


def _check(model: PreTrainedModel) -> None:
    """The configuration alone must describe the pruned model, or no one could load it again."""
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    expected = {name: parameter.shape for name, parameter in fresh.named_parameters()}
    if shapes != expected:
        wrong = sorted(
            name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)
        )
        raise UserError(
            f"{type(model).__name__} can't be pruned this way: its configuration doesn't describe the "
            f"result (first difference: {wrong[0]})."
        )
