"""A smaller student cut out of a model: fewer decoder layers, narrower feed-forward layers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dskd_lightning.errors import UserError
from dskd_lightning.models.feed_forward import (
    check_narrowing,
    feed_forward,
    outputs_of,
    select_inputs,
    select_outputs,
    weight_of,
)
from dskd_lightning.models.output import decoder_hidden, decoder_layers
from dskd_lightning.structures import TokenBatch

if TYPE_CHECKING:
    from dskd_lightning.models.spec import PruneSpec

__all__ = ["evenly_spaced", "prune", "prune_feed_forward", "prune_layers"]

_log = logging.getLogger(__name__)


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
    key, old = check_narrowing(model, width)
    model = copy.deepcopy(model)
    activity = _activity(model, old, batches) if batches else {}
    for layer in decoder_layers(model):
        inward, outward = feed_forward(layer, old)
        matrices = [part for linear in inward for part in weight_of(linear).split(old)]
        read = weight_of(outward[0]).T.float().square().sum(1)
        if outward[0] in activity:
            scores = activity[outward[0]] * read
        else:
            scores = torch.stack([*(part.float().square().sum(1) for part in matrices), read]).sum(0)
        units = scores.topk(width).indices.sort().values
        for linear in inward:
            select_outputs(linear, torch.cat([units + old * i for i in range(outputs_of(linear) // old)]))
        select_inputs(outward[0], units)
    setattr(model.config.get_text_config(), key, width)
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

    outward = [part for layer in decoder_layers(model) for part in feed_forward(layer, width)[1][:1]]
    hooks = [module.register_forward_pre_hook(add) for module in outward]
    try:
        for batch in batches:
            real = None if batch.attention_mask is None else batch.attention_mask.bool()
            decoder_hidden(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return sums


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
