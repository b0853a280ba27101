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

__all__ = ["TileFunction", "first_rows", "paired_logit_sum"]

TileFunction = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, dict[str, Tensor]]]
"""``fn(student_logits, teacher_logits, paired, rows) -> (loss, stats)`` of one tile."""


def paired_logit_sum(
    fn: TileFunction,
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head],
    position: Tensor,
    rows: Sequence[Tensor],
    *,
    most: int | None = None,
    memory_budget_mb: float,
    copies: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum a loss of student logits and of the teacher logits that some of them are paired with.

    The products with the heads run over chunks, the loss and its gradient to the student's logits
    over tiles of a chunk: on a CPU a few rows that share the cache, elsewhere the whole chunk.
    Gradients are made in the forward pass, so that no logits outlive their chunk. The teacher
    gets none. Student positions with a partner come first, so that sizes are all that the host
    must know.

    Args:
        fn: of a tile's student logits ``[tile, vocab]``, teacher logits ``[p, teacher vocab]`` that its
            first ``p`` rows are compared with, whether they are paired ``[p]`` (the others' teacher
            logits are those of any position) and slices of ``rows``: a scalar *sum*, and detached
            scalar sums as statistics. Logits are float32 or float64.
        student: hidden states ``[n, hidden]`` and the head that reads them.
        teacher: hidden states ``[m, teacher hidden]`` and their head.
        position: ``[n]``, the teacher position of each student position, -1 where there is none.
        rows: further tensors ``[n, ...]`` that ``fn`` reads, with a gradient or without.
        most: at least as many as there are pairs, where the host knows such a number: it doesn't wait for
            a GPU to count them then.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk.
        copies: how many of that size ``fn`` has at once, gradients included.

    Returns:
        The loss, 0 with zero gradients where there are no positions, and the stats, summed.
    """
    (hidden, head), (teacher_hidden, teacher_head) = student, teacher
    stats: dict[str, Tensor] = {}
    settings = (fn, head, teacher_head, memory_budget_mb, copies, stats)
    order, count = first_rows(position >= 0, most if len(teacher_hidden) else 0)
    partners = position[order[:count]]
    theirs = teacher_hidden[partners.clamp(min=0)]
    ordered = [tensor.index_select(0, order) for tensor in (hidden, *rows)]
    return _apply(settings, ordered[0], theirs, partners >= 0, ordered[1:]), stats


def first_rows(mask: Tensor, most: int | None) -> tuple[Tensor, int]:
    """All row numbers ``[n]``, those in the mask first, and how many at the beginning hold these.

    Args:
        mask: ``[n]``.
        most: at least as many as the mask has, where the host knows such a number. A CPU counts for itself,
            and so does every device where it is None.
    """
    order = (~mask).to(torch.uint8).argsort(stable=True)
    if most is None or mask.device.type == "cpu":
        most = int(mask.sum())
    return order, min(most, len(mask))


@torch.compiler.disable
def _apply(
    settings: tuple[Any, ...],
    hidden: Tensor,
    teacher_hidden: Tensor,
    paired: Tensor,
    rows: Sequence[Tensor],
) -> Tensor:
    head: Head = settings[1]
    return _PairedLogitSum.apply(  # type: ignore[no-any-return]
        settings, torch.is_grad_enabled(), hidden, head.weight, head.bias, teacher_hidden, paired, *rows
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
        paired: Tensor,
        *rows: Tensor,
    ) -> Tensor:
        fn, head, teacher_head, budget, copies, stats = settings
        needs = [need and grad_enabled for need in ctx.needs_input_grad]
        student = ChunkedHead(hidden, weight, bias, (needs[2], needs[3], needs[4]))
        teacher = ChunkedHead(teacher_hidden, teacher_head.weight, teacher_head.bias, (False, False, False))
        vocab, device = max(head.vocab_size, teacher_head.vocab_size), hidden.device
        tile = tile_rows(vocab, device)
        cpu = device.type == "cpu"  # only the logits fill the chunk there
        size = student.weight.element_size() if cpu else 4
        chunk = chunk_tokens(vocab, budget, copies=2 if cpu else copies, itemsize=size, device=device)
        d_rows = [torch.zeros_like(x) if need else None for x, need in zip(rows, needs[7:], strict=True)]
        total: Tensor | None = None
        collected: dict[str, list[Tensor]] = {}
        for span in spans(len(hidden), chunk):
            logits, theirs = student.logits(span), teacher.logits(span)
            for inner in spans(len(logits), tile):
                cut = slice(span.start + inner.start, span.start + inner.stop)
                leaf = logits[inner].detach().requires_grad_(student.needs)
                own = [
                    x[cut].detach().requires_grad_(d is not None) for x, d in zip(rows, d_rows, strict=True)
                ]
                with torch.set_grad_enabled(any(needs)):
                    loss, found = fn(
                        head.scaled(wide(leaf)),
                        teacher_head.scaled(wide(theirs[inner])),
                        paired[cut],
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
