"""What was measured of a model's layers, kept: the variants of a study and repeated runs prune alike."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dskd_lightning.cache_dir import cache_dir
from dskd_lightning.errors import UserError
from dskd_lightning.files import read_object, write_object
from dskd_lightning.models.fingerprint import weights_fingerprint
from dskd_lightning.models.output import decoder_layers
from dskd_lightning.models.pruning import evenly_spaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dskd_lightning.models.spec import PruneSpec
    from dskd_lightning.structures import TokenBatch

__all__ = ["LayerMeasurements", "LayerRanking", "measured_once"]

_log = logging.getLogger(__name__)
_VERSION = 2
"""Of how layers are measured."""


@dataclass(frozen=True)
class LayerRanking:
    """The layers of a model in the order in which a smaller student does without them.

    Args:
        dropped: indices, the first to go first; those that were never dropped are missing.
        scores: of each layer: its influence, or the loss (nats per token) that dropping it led to,
            None for those that were kept.
    """

    dropped: tuple[int, ...]
    scores: tuple[float | None, ...]

    def kept(self, count: int) -> list[int]:
        """Ascending indices of the ``count`` layers that stay.

        Raises:
            UserError: ``count`` is out of range.
        """
        total = len(self.scores)
        evenly_spaced(count, total)  # the same limits
        return sorted(set(range(total)).difference(self.dropped[: total - count]))


@dataclass(frozen=True)
class LayerMeasurements(LayerRanking):
    """A ranking, and what the model loses by it.

    Args:
        before: mean loss of the calibration responses with all layers, nats per token.
        after: the same with those alone that the spec keeps.
    """

    before: float
    after: float


def measured_once(
    model: PreTrainedModel,
    prune: PruneSpec,
    batches: Sequence[TokenBatch],
    measure: Callable[[], LayerMeasurements],
) -> LayerMeasurements:
    """What ``measure`` says of these weights, this choice and this text: now, or when it was asked first.

    Args:
        model: the whole model.
        prune: what to keep of it.
        batches: the calibration text.
        measure: is called where nothing is kept of it, or what is kept is damaged.
    """
    path = cache_dir("layers") / f"{_key(model, prune, batches)}.json"
    layers = len(decoder_layers(model))
    try:
        if (kept := _read(path, layers)) is not None:
            _log.info("Layers were measured earlier: %s.", path)
            return kept
    except UserError as error:
        _log.warning("%s", error)
    found = measure()
    try:
        write_object(path, asdict(found))
    except UserError as error:
        _log.warning("The layers' measurements aren't kept: %s", error)
    return found


def _key(model: PreTrainedModel, prune: PruneSpec, batches: Sequence[TokenBatch]) -> str:
    said = f"{_VERSION} {weights_fingerprint(model)} {prune.by} {prune.layers}"
    device = model.device.type
    if torch.is_autocast_enabled(device):
        said += f" {torch.get_autocast_dtype(device)}"
    digest = hashlib.sha256(said.encode())
    for batch in batches:
        for tensor in (batch.input_ids, batch.labels, batch.attention_mask):
            if tensor is not None:
                digest.update(f"\n{tuple(tensor.shape)}\n".encode())
                digest.update(tensor.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _read(path: Path, layers: int) -> LayerMeasurements | None:
    """What a file holds; None where there is none.

    Raises:
        UserError: it holds something else.
    """
    if not path.exists():
        return None
    remedy = "the layers are measured anew"
    values = read_object(path, remedy)
    dropped, scores = _all(values.get("dropped"), int), _all(values.get("scores"), float, type(None))
    losses = _all([values.get(name) for name in ("before", "after")], float)
    if not (
        len(scores) == layers
        and len({*dropped}) == len(dropped)
        and {*dropped} <= {*range(layers)}
        and len(losses) == 2
        and all(map(math.isfinite, losses))
    ):
        raise UserError(f"{path}: holds no measurements of {layers} layers; {remedy}.")
    return LayerMeasurements(tuple(dropped), tuple(scores), losses[0], losses[1])


def _all(values: object, *kinds: type) -> list[Any]:
    """The values of a list that holds nothing else; else none."""
    found = values if isinstance(values, list) else []
    return found if all(type(value) in kinds for value in found) else []
