"""Losses on pairs of logits of two vocabularies, in tiles over which autograd runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dskd_lightning.functional._chunked_head import ChunkedHead
from dskd_lightning.functional._made_gradients import save_gradients, scaled_gradients
from dskd_lightning.functional._tiles import tile_rows
from dskd_lightning.functional.chunking import chunk_tokens, join_stats, spans
from dskd_lightning.functional.precision import wide
from dskd_lightning.structures import Head

__all__ = ["TileFunction", "paired_logit_sum"]

TileFunction = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, dict[str, Tensor]]]
"""``fn(student_logits, teacher_logits, paired, rows) -> (loss, stats)`` of one tile."""


def paired_logit_sum(
    fn: TileFunction,
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head],
    position: Tensor,
    rows: Sequence[Tensor],
    *,
    memory_budget_mb: float,
    copies: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum a loss of student logits and of the teacher logits that some of them are paired with.

    The products with the heads run over chunks, the loss and its gradient to the student's logits
    over tiles of a chunk: on a CPU a few rows that share the cache, elsewhere the whole chunk.
    Gradients are made in the forward pass, so that no logits outlive their chunk. The teacher
    gets none.

    Args:
        fn: of a tile's student logits ``[tile, vocab]``, teacher logits ``[pairs, teacher vocab]``,
            the pairs' places in the tile ``[pairs]`` and slices of ``rows``: a scalar *sum*, and
            detached statistics. Logits are float32 or float64.
        student: hidden states ``[n, hidden]`` and the head that reads them.
        teacher: hidden states ``[m, teacher hidden]`` and their head.
        position: ``[n]``, the teacher position of each student position, -1 where there is none.
        rows: further tensors ``[n, ...]`` that ``fn`` reads, with a gradient or without.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk.
        copies: how many of that size ``fn`` has at once, gradients included.

    Returns:
        The loss, 0 with zero gradients where there are no positions, and the stats: scalars summed,
        other tensors concatenated along their first dimension.
    """
    (hidden, head), (teacher_hidden, teacher_head) = student, teacher
    stats: dict[str, Tensor] = {}
    settings = (fn, head, teacher_head, memory_budget_mb, copies, stats)
    return _apply(settings, hidden, teacher_hidden, position, rows), stats


@torch.compiler.disable
def _apply(
    settings: tuple[Any, ...],
    hidden: Tensor,
    teacher_hidden: Tensor,
    position: Tensor,
    rows: Sequence[Tensor],
) -> Tensor:
    head: Head = settings[1]
    return _PairedLogitSum.apply(  # type: ignore[no-any-return]
        settings, torch.is_grad_enabled(), hidden, head.weight, head.bias, teacher_hidden, position, *rows
    )


class _PairedLogitSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: tuple[Any, ...],
        grad_enabled: bool,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        position: Tensor,
        *rows: Tensor,
    ) -> Tensor:
        fn, head, teacher_head, budget, copies, stats = settings
        needs = [need and grad_enabled for need in ctx.needs_input_grad]
        student = ChunkedHead(hidden, weight, bias, (needs[2], needs[3], needs[4]))
        paired = (position >= 0).nonzero().squeeze(1)
        teacher = ChunkedHead(
            teacher_hidden[position[paired]], teacher_head.weight, teacher_head.bias, (False, False, False)
        )
        vocab, device = max(head.vocab_size, teacher_head.vocab_size), hidden.device
        tile = tile_rows(vocab, device)
        cpu = device.type == "cpu"  # only the logits fill the chunk there
        size = student.weight.element_size() if cpu else 4
        chunk = chunk_tokens(vocab, budget, copies=2 if cpu else copies, itemsize=size, device=device)
        d_rows = [torch.zeros_like(x) if need else None for x, need in zip(rows, needs[7:], strict=True)]
        ordered = paired.cpu()  # waits for the device once
        total: Tensor | None = None
        collected: dict[str, list[Tensor]] = {}
        for span in spans(len(hidden), chunk):
            pairs = _among(ordered, span)
            logits, theirs = student.logits(span), teacher.logits(pairs)
            for inner in spans(len(logits), tile):
                cut = slice(span.start + inner.start, span.start + inner.stop)
                mine = _among(ordered, cut)
                leaf = logits[inner].detach().requires_grad_(student.needs)
                own = [
                    x[cut].detach().requires_grad_(d is not None) for x, d in zip(rows, d_rows, strict=True)
                ]
                with torch.set_grad_enabled(any(needs)):
                    loss, found = fn(
                        head.scaled(wide(leaf)),
                        teacher_head.scaled(wide(theirs[mine.start - pairs.start : mine.stop - pairs.start])),
                        paired[mine] - cut.start,
                        tuple(own),
                    )
                if len(hidden) and loss.requires_grad:
                    _add_gradients(loss, leaf, logits[inner], own, d_rows, cut)
                value = loss.detach() if len(hidden) else torch.zeros_like(loss)
                total = value.clone() if total is None else total.add_(value)
                for name, stat in found.items():
                    collected.setdefault(name, []).append(stat.detach())
                del loss, found, leaf
            if student.needs:
                student.backward(span, logits)
            del logits, theirs
        stats |= join_stats(collected)
        save_gradients(ctx, [*student.gradients(), None, None, *d_rows])
        assert total is not None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *scaled_gradients(ctx, upstream[0]))


def _among(ordered: Tensor, span: slice) -> slice:
    """Where in the ordered row numbers, on the CPU, those in ``span`` are."""
    return slice(*torch.searchsorted(ordered, torch.tensor([span.start, span.stop])).tolist())


def _add_gradients(
    loss: Tensor,
    leaf: Tensor,
    logits: Tensor,
    own: Sequence[Tensor],
    d_rows: Sequence[Tensor | None],
    cut: slice,
) -> None:
    """Overwrite the tile's logits by their gradient, and fill in those of the rows."""
    wanted = [x for x in (leaf, *own) if x.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    if leaf.requires_grad:
        gradient = next(found)
        logits.zero_() if gradient is None else logits.copy_(gradient)
    for buffer in d_rows:
        if buffer is not None and (gradient := next(found)) is not None:
            buffer[cut] = gradient
