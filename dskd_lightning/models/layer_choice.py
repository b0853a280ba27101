"""Which decoder layers a pruned student keeps: those that do most on text of the training data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dskd_lightning.errors import UserError
from dskd_lightning.models.feed_forward import check_narrowing
from dskd_lightning.models.layer_measurements import LayerMeasurements, LayerRanking, measured_once
from dskd_lightning.models.loading import load_model
from dskd_lightning.models.output import decoder_hidden, decoder_layers, language_head
from dskd_lightning.models.pruning import evenly_spaced
from dskd_lightning.processor import working_device
from dskd_lightning.structures import TokenBatch

if TYPE_CHECKING:
    from dskd_lightning.models.spec import ModelSpec, StudentSpec

__all__ = ["Calibration", "block_influence", "decide_layers", "rank_layers", "response_loss"]

_log = logging.getLogger(__name__)

Calibration = Callable[["ModelSpec", int], Sequence[TokenBatch]]
"""Batches of so many training examples, as the model of a spec reads them with its own tokenizer."""


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: Sequence[TokenBatch]) -> list[float]:
    """``1 - mean cos(h_l, h_{l+1})`` of each decoder layer (ShortGPT, arXiv 2403.03853).

    Args:
        model: a causal language model in eval mode.
        batches: text; the mean runs over all tokens but padding.
    """
    layers = decoder_layers(model)
    sums = torch.zeros(len(layers), dtype=torch.float64)
    tokens = 0
    seen: dict[int, Tensor] = {}

    def hook(index: int) -> Callable[..., None]:
        def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            seen[index] = F.cosine_similarity(before.float(), after.float(), dim=-1)

        return compare

    hooks = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for batch in batches:
            decoder_hidden(model, batch)
            real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
            tokens += int(real.sum())
            for index, cosine in seen.items():
                sums[index] += float((1 - cosine)[real.bool()].cpu().double().sum())
    finally:
        for handle in hooks:
            handle.remove()
    return (sums / max(tokens, 1)).tolist()


@torch.no_grad()
def response_loss(model: PreTrainedModel, batches: Sequence[TokenBatch]) -> float:
    """Mean negative log-likelihood of the response tokens, nats per token."""
    head, total, tokens = language_head(model), 0.0, 0
    for batch in batches:
        logits = head.logits(batch.select(decoder_hidden(model, batch))).float()
        labels = batch.select(batch.labels)
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        tokens += len(labels)
    return total / max(tokens, 1)


def rank_layers(
    model: PreTrainedModel, by: str, batches: Sequence[TokenBatch], smallest: int = 1
) -> LayerRanking:
    """Rank the decoder layers by what they do on ``batches``.

    Args:
        model: the whole model, in eval mode.
        by: ``influence`` drops the layers of least `block_influence`; ``perplexity`` drops one layer after
            the other, each time the one without which the responses are likeliest.
        batches: calibration text on the model's device.
        smallest: layers that are left at least; fewer needn't be ranked.

    Raises:
        UserError: ``smallest`` is out of range.
    """
    total = len(decoder_layers(model))
    evenly_spaced(smallest, total)
    if by == "influence":
        scores = block_influence(model, batches)
        return LayerRanking(tuple(sorted(range(total), key=lambda i: (scores[i], -i))), tuple(scores))
    kept, dropped = list(range(total)), []
    losses: list[float | None] = [None] * total
    while len(kept) > smallest:
        trials = {}
        for index in kept:
            with _only(model, [i for i in kept if i != index]):
                trials[index] = response_loss(model, batches)
        worst = min(kept, key=lambda i: (trials[i], i))
        losses[worst] = trials[worst] if math.isfinite(trials[worst]) else None
        kept.remove(worst)
        dropped.append(worst)
        _log.info("Without layer %d: %.3f nats per token, %d layers left.", worst, trials[worst], len(kept))
    return LayerRanking(tuple(dropped), tuple(losses))


def decide_layers(spec: StudentSpec, calibration: Calibration | None) -> StudentSpec:
    """``spec`` with the list of the layers that its source keeps, where it names their number alone.

    The list is what runs and checkpoints record, and what was measured is kept: nothing is measured a second
    time.

    Raises:
        UserError: there is no text to measure the layers on.
    """
    prune = spec.prune
    if prune is None or not isinstance(prune.layers, int) or prune.by == "even":
        return spec
    if spec.random_init:
        raise UserError("`student.prune.by`: new weights have no layers worth keeping; set it to even.")
    if calibration is None:
        raise UserError(
            f"`student.prune.by: {prune.by}` is measured on training data, and there is none here: give the "
            "Trainer a datamodule, list the layers to keep, or set it to even."
        )
    device = working_device()
    model = load_model(spec).to(device).eval()  # type: ignore[arg-type]
    if prune.intermediate_size is not None:
        check_narrowing(model, prune.intermediate_size)
    batches = [batch.to(device) for batch in calibration(spec, prune.calibration)]
    found = measured_once(model, prune, batches, partial(_measure, model, prune.by, batches, prune.layers))
    kept, scores = found.kept(prune.layers), ["kept" if s is None else f"{s:.3f}" for s in found.scores]
    _log.info(
        "Keeps %d of %d layers by %s: %s; perplexity of %d calibration responses %.2f before, %.2f after. "
        "Scores by layer: %s.",
        len(kept), len(scores), prune.by, kept, prune.calibration,
        math.exp(found.before), math.exp(found.after), ", ".join(scores),
    )  # fmt: skip
    return replace(spec, prune=replace(prune, layers=kept))


def _measure(
    model: PreTrainedModel, by: str, batches: Sequence[TokenBatch], layers: int
) -> LayerMeasurements:
    ranking = rank_layers(model, by, batches, layers)
    before = response_loss(model, batches)
    with _only(model, ranking.kept(layers)):
        return LayerMeasurements(ranking.dropped, ranking.scores, before, response_loss(model, batches))


@contextmanager
def _only(model: PreTrainedModel, kept: Sequence[int]) -> Iterator[None]:
    """The model with those layers alone; the others hand on what they get."""
    layers = decoder_layers(model)
    forwards = {}
    for index, layer in enumerate(layers):
        if index not in kept:
            forwards[index] = layer.forward
            layer.forward = _hand_on(layer)
    try:
        yield
    finally:
        for index in forwards:
            del layers[index].__dict__["forward"]


_RETURNED: dict[type[nn.Module], int] = {}
"""How many values layers of a class return, 0 for a tensor alone; known once one of them ran."""


def _hand_on(layer: nn.Module) -> Callable[..., Any]:
    kind, own = type(layer), layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if kind not in _RETURNED:
            output = own(*args, **kwargs)
            _RETURNED[kind] = len(output) if isinstance(output, tuple) else 0
        values = _RETURNED[kind]
        return (hidden, *[None] * (values - 1)) if values else hidden

    return forward
