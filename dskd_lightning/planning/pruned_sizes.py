"""What a model loses and gains as decoder layers are cut out of it: a table to choose a student by."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dskd_lightning.data import InstructionDataModule
from dskd_lightning.errors import UserError
from dskd_lightning.models.feed_forward import check_narrowing
from dskd_lightning.models.layer_choice import rank_layers, response_loss
from dskd_lightning.models.loading import load_model
from dskd_lightning.models.output import decoder_layers
from dskd_lightning.models.pruning import evenly_spaced, prune
from dskd_lightning.models.spec import Dtype, PruneSpec, StudentSpec
from dskd_lightning.processor import in_a_computed_type, working_device
from dskd_lightning.structures import TokenBatch

__all__ = ["PrunedSize", "PruningStudy"]

_READ = 2000
_ROWS = 6
_ROUNDS = 3


@dataclass(frozen=True)
class PrunedSize:
    """One size of a pruned model, before any training.

    Args:
        layers: indices of the decoder layers that it keeps.
        parameters: all of them, a tied head once.
        bytes: of the weights as stored.
        tokens_per_second: prompt and response tokens read in a forward pass, the fastest of three.
        perplexity: of the held-out responses.
        intermediate_size: units of its feed-forward layers; None where they are the model's own.
    """

    layers: tuple[int, ...]
    parameters: int
    bytes: int
    tokens_per_second: float
    perplexity: float
    intermediate_size: int | None = None


@dataclass
class PruningStudy:
    """Cuts one model to several sizes and measures each.

    The examples, evenly spaced in the first 2,000 records, are of two kinds by turns: every other batch
    chooses the layers, the others measure, so that a table's perplexities are of text that chose nothing.

    Args:
        source: the model, see `ModelSpec.source`.
        data: of what the student will be trained for; see `InstructionDataModule`.
        by: see `PruneSpec.by`.
        intermediate_size: see `PruneSpec.intermediate_size`; for every size.
        examples: for both purposes together.
        max_length: most tokens of an example.
        dtype: of the weights.

    Raises:
        UserError: there are too few examples, or the feed-forward layers can't be cut like this.
    """

    source: str
    data: str
    by: Literal["influence", "perplexity", "even"] = "influence"
    intermediate_size: int | None = None
    examples: int = 64
    max_length: int = 512
    dtype: Dtype = "auto"
    model: PreTrainedModel = field(init=False, repr=False)
    tokenizer: PreTrainedTokenizerFast = field(init=False, repr=False)
    stored_dtype: torch.dtype = field(init=False)
    scores: tuple[float | None, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        spec = StudentSpec(source=self.source, dtype=self.dtype)
        data = InstructionDataModule(
            self.data, student=spec, limit=_READ, max_length=self.max_length,
            max_prompt_length=self.max_length // 2,
        )  # fmt: skip
        batches = data.calibration(spec, self.examples) if self.examples > 0 else []
        if len(batches) < 2:
            raise UserError(
                f"{self.data}: of --examples {self.examples} none is left to measure on: some choose the "
                "layers, others measure, in batches of eight; give more data or a larger --examples."
            )
        self.tokenizer = data.student_tokenizer
        model: Any = load_model(spec)
        self.stored_dtype = model.dtype
        device = working_device()
        # Exactly, and back where it is written.
        self.model = in_a_computed_type(model, device).to(device).eval()
        if self.intermediate_size is not None:
            check_narrowing(self.model, self.intermediate_size)
        self._choosing = [batch.to(device) for batch in batches[::2]]
        self._measuring = [batch.to(device) for batch in batches[1::2]]

    @property
    def total(self) -> int:
        """Decoder layers of the whole model."""
        return len(decoder_layers(self.model))

    def usual_sizes(self) -> list[int]:
        """Six numbers of layers, from all to about a third."""
        least = max(1, self.total // 3)
        steps = {round(self.total - i * (self.total - least) / (_ROWS - 1)) for i in range(_ROWS)}
        return sorted(steps, reverse=True)

    def whole(self) -> PrunedSize:
        """What was measured of the model as it is, all layers and units."""
        response_loss(self.model, self._measuring[:1])  # warm
        return self._measured(self.model, range(self.total))

    def sizes(self, counts: Sequence[int]) -> Iterator[tuple[PrunedSize, PreTrainedModel]]:
        """Each number of layers with what was measured of it, and the model itself.

        Raises:
            UserError: a number is out of range, or the architecture can't be cut like this.
        """
        for count in counts:
            evenly_spaced(count, self.total)
        ranking = None
        if self.by != "even" and min(counts) < self.total:
            ranking = rank_layers(self.model, self.by, self._choosing, min(counts))
            self.scores = ranking.scores
        response_loss(self.model, self._measuring[:1])  # warm
        for count in counts:
            kept = evenly_spaced(count, self.total) if ranking is None else ranking.kept(count)
            spec = PruneSpec(layers=kept, intermediate_size=self.intermediate_size)
            model = prune(self.model, spec, self._choosing if self.by != "even" else ())
            yield replace(self._measured(model, kept), intermediate_size=self.intermediate_size), model

    def _measured(self, model: PreTrainedModel, kept: Sequence[int]) -> PrunedSize:
        loss = response_loss(model, self._measuring)
        seconds = []
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            response_loss(model, self._measuring[:1])
            seconds.append(time.perf_counter() - begin)
        parameters = sum(p.numel() for p in model.parameters())
        return PrunedSize(
            layers=tuple(kept),
            parameters=parameters,
            bytes=parameters * self.stored_dtype.itemsize,
            tokens_per_second=_real(self._measuring[0]) / min(seconds),
            perplexity=float(torch.tensor(loss, dtype=torch.float64).exp()),
        )


def _real(batch: TokenBatch) -> int:
    mask = batch.attention_mask
    return batch.input_ids.numel() if mask is None else int(mask.sum())
