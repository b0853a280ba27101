"""What the arithmetic of a run starts from: models, data, objective and devices, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dskd_lightning.errors import UserError
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.models.teacher_cache_settings import CacheDtype

__all__ = ["DataSize", "Layout", "Losses", "ModelSize"]


@dataclass(frozen=True)
class ModelSize:
    """Counts of one model.

    Args:
        parameters: all of them, a tied head once, adapters included.
        trained: those that training changes.
        layers: decoder layers.
        hidden: width of the hidden states.
        vocabulary: rows of the head.
        weight_bytes: of one stored weight.
        layered: parameters of the decoder layers, without adapters.
        attention: width of a layer's queries.
        keys: width of its keys, and of its values.
        wide: width within its feed-forward part.
        kept: tensors of that width that the backward pass needs.
        readers: products of a layer that read a normalised input.
        rms: whether norms are RMS norms, which transformers computes by parts.
        adapted: parameters of adapters; the others are frozen then.
        offloaded: the layers stay in the host's memory and visit a GPU one after another.
    """

    parameters: int
    trained: int
    layers: int
    hidden: int
    vocabulary: int
    weight_bytes: float
    layered: int
    attention: int
    keys: int
    wide: int
    kept: int = 4
    readers: int = 5
    rms: bool = True
    adapted: int = 0
    offloaded: bool = False

    @property
    def bytes(self) -> float:
        """Of all weights; adapters are float32."""
        return (self.parameters - self.adapted) * self.weight_bytes + self.adapted * 4

    @property
    def layer_bytes(self) -> float:
        """Of the decoder layers with their adapters."""
        return self.layered * self.weight_bytes + self.adapted * 4

    @property
    def outer_bytes(self) -> float:
        """Of embeddings, head and last norm."""
        return self.bytes - self.layer_bytes

    @property
    def trained_bytes(self) -> float:
        """Of the gradients, in the type of the weights."""
        return self.trained * (4 if self.adapted else max(self.weight_bytes, 2))

    @property
    def trains_head(self) -> bool:
        """Whether embeddings and head train, too."""
        return self.trained == self.parameters


@dataclass(frozen=True)
class DataSize:
    """The training data, as one epoch reads them.

    Args:
        examples: of an epoch.
        tokens: the student's, padding left out.
        responses: those of them that are predicted and learnt.
        padded: tokens with padding.
        batches: micro-batches, of all ranks.
        largest: tokens of the largest micro-batch, padding included.
        epochs: passes over the data.
        teacher_tokens: of each teacher's rendering; None for as many as the student's.
        raw_bytes: of the examples themselves as they are kept; None where only tokens are known.
        disk_limit: most bytes that prepared data take, where files come and go; None keeps all.
    """

    examples: int
    tokens: int
    responses: int
    padded: int
    batches: int
    largest: int
    epochs: float = 1.0
    teacher_tokens: int | None = None
    raw_bytes: int | None = None
    disk_limit: int | None = None

    def scaled(self, examples: int) -> DataSize:
        """As many examples as said, of the same lengths."""
        share = examples / self.examples
        counts = ("examples", "tokens", "responses", "padded", "batches", "teacher_tokens", "raw_bytes")
        values = {name: getattr(self, name) for name in counts}
        return replace(self, **{name: round(n * share) for name, n in values.items() if n is not None})

    @property
    def length(self) -> float:
        """Mean tokens of an example."""
        return self.tokens / max(1, self.examples)

    @property
    def largest_responses(self) -> int:
        """Response tokens of the largest micro-batch."""
        return round(self.largest * self.responses / max(1, self.tokens))


@dataclass(frozen=True)
class Losses:
    """What an objective holds and multiplies.

    Args:
        kind: ``sft`` reads the student's head alone, ``logits`` both heads, ``dual`` both in both spaces.
        projectors: trained parameters, float32.
        fixed: bytes of what is made of the heads and kept on every rank.
        budget: bytes that vocabulary-sized tensors may take together.
        student_products: of a response token with the student's head, beyond those of the kind.
        teacher_products: with each teacher's.
    """

    kind: Literal["sft", "logits", "dual"] = "dual"
    projectors: int = 0
    fixed: float = 0.0
    budget: float = DEFAULT_BUDGET_MB * 2**20
    student_products: int = 0
    teacher_products: int = 0

    @property
    def heads(self) -> int:
        """Whose logits a chunk holds at once."""
        return 1 if self.kind == "sft" else 2


@dataclass(frozen=True)
class Layout:
    """Devices, and what each of them keeps.

    Args:
        ranks: devices in all.
        sharded: weights, gradients and optimizer states are shared out (FSDP2) instead of copied (DDP).
        replicas: copies, each sharded over its part of the ranks (HSDP).
        mixed: products run in 16 bits, weights stay as they are.
        checkpointing: activations are computed again in the backward pass.
        cached: the teachers' hidden states come from the disk.
        codec: how they are stored.
        states: float32 numbers, or as wide as the weight, that the optimizer keeps of each trained weight.
        accumulate: micro-batches of an optimizer step.
        cuda: devices are GPUs.

    Raises:
        UserError: the ranks can't be shared out like this.
    """

    ranks: int = 1
    sharded: bool = False
    replicas: int = 1
    mixed: bool = False
    checkpointing: bool = False
    cached: bool = False
    codec: CacheDtype = "bfloat16"
    states: float = 2.0
    accumulate: int = 1
    cuda: bool = True

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UserError(f"{self.ranks} ranks: a run needs at least one.")
        if self.replicas < 1 or self.ranks % self.replicas:
            raise UserError(f"{self.ranks} ranks can't hold {self.replicas} copies; give a divisor.")

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the weights."""
        return self.ranks // self.replicas if self.sharded else 1

    def precision(self, model: ModelSize) -> Literal["32", "mixed", "16"]:
        """How activations are kept."""
        if model.weight_bytes == 2:
            return "16"
        return "mixed" if self.mixed else "32"

    def width(self, model: ModelSize) -> int:
        """Bytes of a product's result."""
        return 4 if self.precision(model) == "32" else 2
