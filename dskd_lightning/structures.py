"""The tensors that flow between data, models and objectives, with their shapes.

Nothing here knows Lightning, transformers or a file format. ``n`` and ``m`` are numbers of
*response positions* of the student and of the teacher: positions that predict a response
token. Prompt and padding positions never reach an objective.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "IGNORE_INDEX",
    "SAMPLE_STATISTICS",
    "Alignment",
    "DistillationBatch",
    "Head",
    "LogProbabilities",
    "ModelSpace",
    "PaddedStatistics",
    "Ratio",
    "Side",
    "TokenBatch",
]

IGNORE_INDEX = -100
"""Label of a position that predicts no response token."""

SAMPLE_STATISTICS = ("length", "finished", "distinct_2", "repeated_4")
"""Of sampled responses: tokens; whether they ended by themselves; shares of bigrams that are the first of
their kind in a sample, and of runs of four tokens that aren't."""

_T = TypeVar("_T")


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, _Movable):
        return value._map(function)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, function) for item in value)
    return value


class _Movable:
    """Mixin: `to` and `pin_memory` over every tensor field, nested ones included."""

    def _map(self: _T, function: Callable[[Tensor], Tensor]) -> _T:
        changes = {f.name: _map_tensors(getattr(self, f.name), function) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **changes)  # type: ignore[type-var]

    def to(self: _T, *args: Any, **kwargs: Any) -> _T:
        """A copy with every tensor moved, as `torch.Tensor.to`; one to a GPU alone isn't waited for.

        What `pin_memory` has put together goes there in one piece.
        """
        only_moves = len(args) == 1 and isinstance(args[0], torch.device) and args[0].type == "cuda"
        if not only_moves:
            return self._map(lambda tensor: tensor.to(*args, **kwargs))  # type: ignore[attr-defined]
        kwargs.setdefault("non_blocking", True)
        asked: Counter[int] = Counter()

        def counted(tensor: Tensor) -> Tensor:
            asked[tensor.untyped_storage().data_ptr()] += _room(tensor)
            return tensor

        self._map(counted)  # type: ignore[attr-defined]
        pieces: dict[int, Tensor] = {}

        def moved(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if 2 * asked[place] < storage.nbytes() or not (tensor.is_pinned() and tensor.is_contiguous()):
                return tensor.to(*args, **kwargs)
            if place not in pieces:
                piece = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
                pieces[place] = piece.to(*args, **kwargs)
            return _part(pieces[place], int(tensor.storage_offset()) * tensor.element_size(), tensor)

        return self._map(moved)  # type: ignore[attr-defined]

    def pin_memory(self: _T) -> _T:
        """A copy with every tensor in one piece of page-locked memory."""
        ends = [0]

        def measured(tensor: Tensor) -> Tensor:
            ends.append(ends[-1] + _room(tensor))
            return tensor

        self._map(measured)  # type: ignore[attr-defined]
        piece = torch.empty(ends[-1], dtype=torch.uint8).pin_memory()
        begins = iter(ends)
        return self._map(lambda tensor: _part(piece, next(begins), tensor).copy_(tensor))  # type: ignore[attr-defined]


_ALIGNMENT = 256
"""Bytes at whose multiples a GPU's own allocations begin."""


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _part(piece: Tensor, begin: int, like: Tensor) -> Tensor:
    """The bytes of ``piece`` from ``begin`` on, of the type and shape of another tensor."""
    return piece[begin : begin + like.nbytes].view(like.dtype).view(like.shape)


@dataclass(frozen=True)
class Head(_Movable):
    """A language-model head: ``logits = softcap(scale * (hidden @ weight.T + bias))``.

    Args:
        weight: ``[vocab, hidden]``.
        bias: ``[vocab]`` or None.
        scale: factor on the logits (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: Gemma's ``cap * tanh(logits / cap)``, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., vocab]`` of hidden states ``[..., hidden]``, in the weight's dtype."""
        return self.scaled(torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias))

    def scaled(self, logits: Tensor) -> Tensor:
        """Scale and softcap on the products ``hidden @ weight.T + bias``."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def detach(self) -> Head:
        """The same head with no gradient to its weight or bias."""
        return self._map(Tensor.detach)

    def restrict(self, tokens: Tensor | slice) -> Head:
        """The head of a part of the vocabulary, ``tokens`` as an index or a slice of it."""
        bias = None if self.bias is None else self.bias[tokens]
        return replace(self, weight=self.weight[tokens], bias=bias)


@dataclass(frozen=True)
class PaddedStatistics(_Movable):
    """Of the padded ``[batch, length]`` layout that a `Side` was selected from.

    Only parity with the published cross-model attention needs it, whose standard deviations
    run over prompt and padding positions too.

    Args:
        positions: ``batch * length``.
        hidden_std: scalar, unbiased standard deviation of all hidden states of that layout.
    """

    positions: int
    hidden_std: Tensor


@dataclass(frozen=True)
class LogProbabilities(_Movable):
    """All that is known of a teacher behind an endpoint or in a file, at its ``m`` response positions.

    Args:
        ids: ``[m, 1 + k]``: the observed token (the label), then the most likely others, none twice; -1 where
            there are fewer, and first where nothing is known of a position.
        values: ``[m, 1 + k]``, their log-probabilities, -inf where the id is -1.
    """

    ids: Tensor
    values: Tensor

    @property
    def known(self) -> Tensor:
        """``[m]``, whether anything is known of a position."""
        return self.ids[:, 0] >= 0

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice) -> LogProbabilities:
        return LogProbabilities(self.ids[rows], self.values[rows])


@dataclass(frozen=True)
class Side(_Movable):
    """One model's view of the response tokens of a batch, flattened over its examples.

    Args:
        hidden: ``[n, hidden]``, what the head consumes (output of the final norm).
        head: the head that reads ``hidden``.
        embeddings: ``[vocab, hidden]``, the input embeddings.
        ids: ``[n]``, the token read at each position (``x`` in the formulas).
        labels: ``[n]``, the token that each position must predict (``y``).
        sequence: ``[n]``, index of the example that the position belongs to, non-decreasing.
        padded: statistics of the padded layout, where an objective asked for them.
        sampled: the student sampled the responses itself, so that ``labels`` are nothing to learn.
        log_probs: all that is known of a teacher whose hidden states aren't; ``hidden``, weight of the head
            and ``embeddings`` are then empty, ``[n, 0]`` and ``[vocab, 0]``.
        extent: number of examples and most positions of one, as the host knows them; None where it would have
            to ask the device.
    """

    hidden: Tensor
    head: Head
    embeddings: Tensor
    ids: Tensor
    labels: Tensor
    sequence: Tensor
    padded: PaddedStatistics | None = None
    sampled: bool = False
    log_probs: LogProbabilities | None = None
    extent: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def detach(self) -> Side:
        """The same view with no gradient to anything."""
        return self._map(Tensor.detach)

    def nothing(self) -> Side:
        """The same model's view of no token."""
        parts = {name: getattr(self, name)[:0] for name in ("hidden", "ids", "labels", "sequence")}
        log_probs = None if self.log_probs is None else self.log_probs[:0]
        return replace(self, **parts, log_probs=log_probs, extent=None)


@dataclass
class Alignment(_Movable):
    """How the response tokens of two tokenisations of the same texts cover the same bytes.

    Positions are those of the two `Side`\\ s: flattened over the batch, identified with the
    token that they predict. A *group* is a smallest run of student tokens and a run of teacher
    tokens that cover exactly the same bytes of one response; end-of-sequence tokens form a
    group of their own. A 1-1 group is an exact pair.

    Args:
        student_group: ``[n]``, group of each student position, -1 where it has none.
        teacher_group: ``[m]``, likewise.
        student_end: ``[n]``, byte offset in its response where the predicted token ends.
        teacher_end: ``[m]``, likewise.
        pairs: ``[pairs, 2]``, student and teacher position of each exact pair, ascending.
        groups: number of groups; ids are ``0 .. groups - 1`` in order of the text.
    """

    student_group: Tensor
    teacher_group: Tensor
    student_end: Tensor
    teacher_end: Tensor
    pairs: Tensor
    groups: int

    @property
    def starts(self) -> tuple[Tensor, Tensor]:
        """``[groups]`` each: the student and the teacher position at which a group begins.

        Both have read the same text there, whatever they predict of it.
        """
        return self._first(self.student_group), self._first(self.teacher_group)

    def _first(self, group: Tensor) -> Tensor:
        slots = group.where(group >= 0, self.groups)  # the last takes those of none: no size to wait for
        places = torch.arange(len(group), device=group.device)
        first = group.new_full((self.groups + 1,), len(group)).scatter_reduce(0, slots, places, "amin")
        return first[: self.groups]


@dataclass
class TokenBatch(_Movable):
    """One model's token ids of a batch, rendered with that model's own template.

    Rows may hold one example each (right-padded) or several packed ones, which
    ``position_ids`` restarting from 0 then tell apart.

    Args:
        input_ids: ``[rows, length]``.
        labels: ``[rows, length]``, already shifted: what each position must predict, or
            `IGNORE_INDEX`.
        attention_mask: ``[rows, length]`` of 0 and 1, or None where rows are packed.
        position_ids: ``[rows, length]``.
        response: ``[n]``, indices into the flattened ``rows * length`` of the response
            positions, ordered by example, then by text.
        sequence: ``[n]``, index of the example in the batch of each response position.
        extent: examples in the batch and most response positions of one, see `Side`.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    response: Tensor
    sequence: Tensor
    extent: tuple[int, int] | None = None

    def select(self, values: Tensor) -> Tensor:
        """Response positions ``[n, ...]`` of ``values`` ``[rows, length, ...]``."""
        return values.flatten(0, 1).index_select(0, self.response)


@dataclass
class DistillationBatch(_Movable):
    """What the collator gives a training step.

    Args:
        student: the student's tokens.
        teachers: one `TokenBatch` per teacher; empty without a teacher.
        alignments: one per teacher; None where the teacher shares the student's tokenizer.
        teacher_hidden: one per teacher: cached hidden states ``[m, hidden]``, `LogProbabilities`, or None.
        examples: ``[batch]``, indices of the examples in their dataset.
        response_bytes: ``[batch]``, UTF-8 bytes of each example's response.
        padding_share: share of ``rows * length`` of the student that is padding.
        step_tokens: scalar, this process's response tokens in all batches of the optimiser step; None
            where this batch is the whole step. See `dskd_lightning.training.windows`.
        samples: ``[4, 2]``, sums and counts of `SAMPLE_STATISTICS` where the student sampled the responses;
            None where they are the dataset's.
        teacher: number of the only teacher that answers for these records, since they name it; the others'
            tokens are then a row without response. None where all teachers answer.
        tokenizers: fingerprints of the tokenizers that cut the texts, the student's first; empty where nobody
            need ask.
    """

    student: TokenBatch
    examples: Tensor
    response_bytes: Tensor
    teachers: tuple[TokenBatch, ...] = ()
    alignments: tuple[Alignment | None, ...] = ()
    teacher_hidden: tuple[Tensor | LogProbabilities | None, ...] = ()
    padding_share: float = 0.0
    step_tokens: Tensor | None = None
    samples: Tensor | None = None
    teacher: int | None = None
    tokenizers: tuple[str, ...] = ()

    def answers(self, teacher: int) -> bool:
        """Whether that teacher answers for these records."""
        return self.teacher in (None, teacher)

    @property
    def sampled(self) -> bool:
        """Whether the student sampled the responses itself."""
        return self.samples is not None

    def __len__(self) -> int:
        """Number of examples, not of rows."""
        return self.examples.shape[0]


@dataclass(frozen=True)
class ModelSpace(_Movable):
    """What an objective may know of a model before training: its sizes, head and tokenizer.

    Args:
        head: the model's head, for sizes and for initialising projectors.
        embeddings: ``[vocab, hidden]``, the input embeddings.
        tokenizer: its fast tokenizer, or None where none is needed.
    """

    head: Head
    embeddings: Tensor
    tokenizer: Any = field(default=None, compare=False)

    @property
    def hidden_size(self) -> int:
        return self.head.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.head.vocab_size


@dataclass(frozen=True)
class Ratio(_Movable):
    """A mean kept as its sum and its count, so that it adds up over batches and ranks.

    Args:
        total: scalar, detached.
        count: scalar.
    """

    total: Tensor
    count: Tensor

    @property
    def value(self) -> Tensor:
        """``total / count``; 0 where nothing was counted."""
        return self.total / self.count.clamp(min=1)

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.total + other.total, self.count + other.count)
