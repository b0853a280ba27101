"""Sums and maps over chunks of tokens in which nothing vocabulary-sized outlives its chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dskd_lightning.functional._made_gradients import save_gradients, scaled_gradients
from dskd_lightning.functional.precision import autocast_to
from dskd_lightning.structures import Head

__all__ = [
    "DEFAULT_BUDGET_MB",
    "chunk_tokens",
    "chunked_map",
    "chunked_sum",
    "head_parameters",
]

DEFAULT_BUDGET_MB = 1536.0
"""Memory that the vocabulary-sized tensors of one chunk may take together."""

OptionalTensors = Sequence[Tensor | None]
ChunkTensors = tuple[Any, ...]  # tensors, None where None was given
SumFunction = Callable[[ChunkTensors, ChunkTensors], tuple[Tensor, dict[str, Tensor]]]
MapFunction = Callable[[ChunkTensors, ChunkTensors], Tensor]


# glibc gives larger blocks back at every release, and the kernel zeroes their pages anew.
_CPU_TENSOR_MB = 24.0


def chunk_tokens(
    vocab_size: int,
    budget_mb: float = DEFAULT_BUDGET_MB,
    *,
    copies: int = 8,
    itemsize: int = 4,
    device: torch.device | None = None,
) -> int:
    """Tokens per chunk such that ``copies`` tensors ``[tokens, vocab]`` fit the budget.

    Args:
        vocab_size: the (larger) vocabulary.
        budget_mb: MiB for one chunk.
        copies: tensors of that size alive at once: logits of two heads and their gradients, and up to a
            dozen of log-probabilities, probabilities and what a divergence makes of them.
        itemsize: bytes of an element, of float32 unless told.
        device: on a CPU, one tensor of a chunk is at most 24 MiB, as memory is reused up to
            that size.

    Returns:
        A multiple of 16, at least 16: fewer rows than that only make the matrix products slow.
    """
    tensor_mb = budget_mb / copies
    if device is not None and device.type == "cpu":
        tensor_mb = min(tensor_mb, _CPU_TENSOR_MB)
    tokens = int(tensor_mb * 2**20 / (itemsize * max(vocab_size, 1)))
    return max(16, tokens // 16 * 16)


def chunked_sum(
    fn: SumFunction, inputs: OptionalTensors, parameters: OptionalTensors = (), *, chunk_size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum a per-chunk loss, with its gradients made chunk by chunk in the forward pass.

    The backward pass only multiplies them with the upstream scalar, so that no activation of a
    chunk is kept or computed twice. Works with autocast, ``torch.compile`` (as a graph break),
    gradient checkpointing and data parallelism; not twice differentiable.

    Args:
        fn: ``fn(chunk, parameters) -> (loss, stats)``: of a tuple of slices of ``inputs`` and the
            whole ``parameters`` (None where None was given) a scalar loss, which must be a *sum*
            over the chunk's tokens, and a dictionary of detached tensors. Everything that
            shall have a gradient must come in through these arguments, not through a closure.
        inputs: tensors with the same first dimension ``tokens``, or None.
        parameters: tensors that every chunk reads whole, or None.
        chunk_size: tokens per chunk.

    Returns:
        The scalar loss, 0 with zero gradients where there are no tokens, and the stats: scalars
        summed over chunks, other tensors concatenated along their first dimension.
    """
    stats: dict[str, Tensor] = {}
    loss = _chunked_sum(fn, tuple(inputs), tuple(parameters), chunk_size, stats)
    return loss, stats


def chunked_map(
    fn: MapFunction, inputs: OptionalTensors, parameters: OptionalTensors = (), *, chunk_size: int
) -> Tensor:
    """Concatenate a per-token function over chunks; the backward pass computes each chunk again.

    Args:
        fn: ``fn(chunk, parameters) -> values`` with a first dimension of the chunk's tokens;
            arguments as for :func:`chunked_sum`. Must be deterministic.
        inputs: tensors with the same first dimension ``tokens``, or None.
        parameters: tensors that every chunk reads whole, or None.
        chunk_size: tokens per chunk.

    Returns:
        ``[tokens, ...]``.
    """
    return _chunked_map(fn, tuple(inputs), tuple(parameters), chunk_size)


@torch.compiler.disable
def _chunked_sum(
    fn: SumFunction,
    inputs: ChunkTensors,
    parameters: ChunkTensors,
    chunk_size: int,
    stats: dict[str, Tensor],
) -> Tensor:
    tensors = (*inputs, *parameters)
    return _ChunkedSum.apply(fn, len(inputs), chunk_size, torch.is_grad_enabled(), stats, *tensors)  # type: ignore[no-any-return]


@torch.compiler.disable
def _chunked_map(fn: MapFunction, inputs: ChunkTensors, parameters: ChunkTensors, chunk_size: int) -> Tensor:
    return _ChunkedMap.apply(fn, len(inputs), chunk_size, *inputs, *parameters)  # type: ignore[no-any-return]


def head_parameters(head: Head) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a head for the ``parameters`` of chunks, cast once where autocast would."""
    return autocast_to(head.weight), None if head.bias is None else autocast_to(head.bias)


def spans(tokens: int, chunk_size: int) -> Iterator[slice]:
    """Slices that cover ``tokens``; one empty slice where there are none."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    for start in range(0, max(tokens, 1), chunk_size):
        yield slice(start, min(start + chunk_size, tokens))


def join_stats(collected: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """The chunks' statistics: scalars summed, other tensors concatenated along their first dimension."""
    return {
        name: torch.cat(list(values)) if values[0].dim() else torch.stack(list(values)).sum(0)
        for name, values in collected.items()
    }


def _rows(inputs: ChunkTensors) -> int:
    rows = {tensor.shape[0] for tensor in inputs if tensor is not None}
    if len(rows) != 1:
        raise ValueError(f"inputs must have one common first dimension, not {sorted(rows) or 'none'}")
    return int(rows.pop())


def _leaves(tensors: ChunkTensors, needs: Sequence[bool]) -> ChunkTensors:
    """Detached aliases that record gradients where ``needs`` says so."""
    return tuple(
        None if tensor is None else tensor.detach().requires_grad_(need)
        for tensor, need in zip(tensors, needs, strict=True)
    )


class _GradientBuffers:
    """Gradients of inputs (written slice by slice) and of parameters (accumulated)."""

    def __init__(self, inputs: ChunkTensors, parameters: ChunkTensors, needs: Sequence[bool]) -> None:
        self.needs = list(needs)
        self.count = len(inputs)
        self.targets = (*inputs, *parameters)
        # Many chunks' small contributions drown in a half-precision accumulator.
        self.buffers = [
            None
            if not need
            else torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            if index < self.count
            else torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            for index, (tensor, need) in enumerate(zip(self.targets, needs, strict=True))
        ]

    def add(self, span: slice, leaves: ChunkTensors, outputs: Tensor, upstream: Tensor | None = None) -> None:
        if not outputs.requires_grad:
            return
        wanted = [index for index, need in enumerate(self.needs) if need]
        gradients = torch.autograd.grad(
            outputs, [leaves[index] for index in wanted], upstream, allow_unused=True
        )
        for index, gradient in zip(wanted, gradients, strict=True):
            buffer = self.buffers[index]
            if gradient is None or buffer is None:
                continue
            if index < self.count:
                buffer[span] = gradient
            else:
                buffer.add_(gradient)

    def result(self) -> list[Tensor | None]:
        return [
            None if buffer is None else buffer.to(target.dtype)
            for buffer, target in zip(self.buffers, self.targets, strict=True)
        ]


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fn: SumFunction,
        count: int,
        chunk_size: int,
        grad_enabled: bool,
        stats: dict[str, Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        inputs, parameters = tensors[:count], tensors[count:]
        tokens = _rows(inputs)
        needs = [need and grad_enabled for need in ctx.needs_input_grad[5:]]
        gradients = _GradientBuffers(inputs, parameters, needs)
        whole = _leaves(parameters, needs[count:])
        total: Tensor | None = None
        collected: dict[str, list[Tensor]] = {}
        for span in spans(tokens, chunk_size):
            chunk = _leaves(
                tuple(None if tensor is None else tensor[span] for tensor in inputs), needs[:count]
            )
            with torch.set_grad_enabled(any(needs)):
                loss, chunk_stats = fn(chunk, whole)
            if loss.dim():
                raise ValueError(f"fn must return a scalar loss, not one of shape {tuple(loss.shape)}")
            if tokens:
                gradients.add(span, (*chunk, *whole), loss)
            value = loss.detach() if tokens else torch.zeros_like(loss)
            total = value.clone() if total is None else total.add_(value)
            for name, stat in chunk_stats.items():
                collected.setdefault(name, []).append(stat.detach())
            del loss, chunk_stats
        stats |= join_stats(collected)
        save_gradients(ctx, gradients.result())
        assert total is not None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, None, *scaled_gradients(ctx, upstream[0]))


class _ChunkedMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fn: MapFunction, count: int, chunk_size: int, *tensors: Tensor | None) -> Tensor:
        inputs, parameters = tensors[:count], tensors[count:]
        tokens = _rows(inputs)
        ctx.fn, ctx.count, ctx.chunk_size, ctx.tokens = fn, count, chunk_size, tokens
        ctx.present = [tensor is not None for tensor in tensors]
        ctx.autocast = _autocast_state(tensors)
        ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))
        values = []
        for span in spans(tokens, chunk_size):
            chunk = tuple(None if tensor is None else tensor[span] for tensor in inputs)
            values.append(fn(chunk, parameters))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        tensors = tuple(next(saved) if present else None for present in ctx.present)
        inputs, parameters = tensors[: ctx.count], tensors[ctx.count :]
        needs = ctx.needs_input_grad[3:]
        gradients = _GradientBuffers(inputs, parameters, needs)
        whole = _leaves(parameters, needs[ctx.count :])
        for span in spans(ctx.tokens, ctx.chunk_size) if ctx.tokens else ():
            chunk = _leaves(
                tuple(None if tensor is None else tensor[span] for tensor in inputs), needs[: ctx.count]
            )
            with torch.enable_grad(), ctx.autocast():
                values = ctx.fn(chunk, whole)
            gradients.add(span, (*chunk, *whole), values, upstream[0][span])
        return (None, None, None, *gradients.result())


def _autocast_state(tensors: Sequence[Tensor | None]) -> Callable[[], torch.autocast]:
    """A factory of contexts that restore the present autocast state in the backward pass."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)
