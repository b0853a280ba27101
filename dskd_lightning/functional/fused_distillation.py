"""Cross-entropy and distillation of one student head against one teacher head in a single pass.

For each chunk of tokens both heads' logits are made once, the losses and diagnostics are read
off them, and their gradients take the logits' place in memory before the matrix products that
bring them back to the hidden states (and to the head where it trains). The backward pass
multiplies these gradients with the upstream scalar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dskd_lightning.functional._chunked_head import ChunkedHead
from dskd_lightning.functional._made_gradients import save_gradients, scaled_gradients
from dskd_lightning.functional._softmax_rows import Scratch
from dskd_lightning.functional._tiles import LossWeights, TileLosses, tile_rows
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB, chunk_tokens, join_stats, spans
from dskd_lightning.functional.divergences import Divergence
from dskd_lightning.structures import Head

__all__ = ["FusedLosses", "fused_chunk", "fused_distillation"]

# More rows don't make the products of a CPU any faster.
_CPU_TOKENS = 512


@dataclass(frozen=True)
class FusedLosses:
    """What one pass over the tokens gives.

    Args:
        loss: scalar with gradients: the weighted sum of the terms.
        stats: detached. Sums ``ce``, ``teacher_ce``, ``kd`` (unweighted, but for ``kd_mask``),
            ``student_entropy``, ``teacher_entropy`` (nats) and ``teacher_confidence`` (largest
            probability, where there is a teacher label if any are given); per token
            ``student_choice`` and ``teacher_choice``, the argmaxes. Only those whose inputs were
            given.
    """

    loss: Tensor
    stats: dict[str, Tensor]


def fused_chunk(
    vocab_size: int, budget_mb: float, *, heads: int, compared: bool, cpu: bool
) -> tuple[int, int]:
    """Tokens of a chunk of `fused_distillation`, and how many tensors ``[tokens, vocab]`` it has at once.

    On a CPU the float32 work happens in cache-sized tiles, and only the logits fill the chunk.

    Args:
        vocab_size: the (larger) vocabulary.
        budget_mb: MiB for those tensors.
        heads: whose logits are made.
        compared: whether there is a divergence.
        cpu: where it runs.
    """
    copies = heads if cpu else 16 if compared else 8
    tokens = chunk_tokens(vocab_size, budget_mb, copies=copies)
    return min(tokens, _CPU_TOKENS) if cpu else tokens, copies


@torch.compiler.disable  # a graph break: the loop over chunks and its gradients aren't for tracing
def fused_distillation(
    student_hidden: Tensor,
    student_head: Head,
    *,
    labels: Tensor | None = None,
    ce_weight: float | Tensor = 1.0,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    teacher_labels: Tensor | None = None,
    teacher_ce_weight: float | Tensor = 1.0,
    divergence: Divergence | None = None,
    temperature: float = 1.0,
    kd_weight: float | Tensor = 1.0,
    kd_mask: Tensor | None = None,
    agreeing_only: bool = False,
    chunk_size: int | None = None,
    memory_budget_mb: float = DEFAULT_BUDGET_MB,
) -> FusedLosses:
    """``ce_weight * CE(s, labels) + teacher_ce_weight * CE(t, teacher_labels) + kd_weight * D(sg(t) || s)``.

    ``s`` and ``t`` are the logits of the two heads; every term is a sum over tokens. Gradients go
    to the student's hidden states and head, and through the teacher's cross-entropy to the
    teacher's hidden states (a projection, in dual-space distillation), in each case only where
    the tensor requires one. The teacher's head never has a gradient. Vocabularies of different
    size are compared on their common prefix, without changing either cross-entropy.

    Args:
        student_hidden: ``[tokens, hidden]``.
        student_head: reads ``student_hidden``.
        labels: ``[tokens]``, the student's target ids, negative where there is none.
        ce_weight: factor on the student's cross-entropy.
        teacher_hidden: ``[tokens, teacher_hidden]``; None leaves out all that is the teacher's.
        teacher_head: reads ``teacher_hidden``.
        teacher_labels: ``[tokens]``, targets of the teacher's cross-entropy, negative for none.
        teacher_ce_weight: factor on the teacher's cross-entropy.
        divergence: ``D``; None leaves the term out.
        temperature: divides both logits in the divergence.
        kd_weight: factor on the divergence.
        kd_mask: ``[tokens]``, factor on each token's divergence, counted in ``kd``.
        agreeing_only: the divergence runs only where the teacher's argmax is its label.
        chunk_size: tokens per chunk; None takes it from ``memory_budget_mb``.
        memory_budget_mb: MiB for the vocabulary-sized tensors of a chunk; a CPU takes no more than those of
            512 tokens.
    """
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head must be given together")
    if divergence is not None and teacher_hidden is None:
        raise ValueError("a divergence needs teacher_hidden and teacher_head")
    if agreeing_only and teacher_labels is None:
        raise ValueError("agreeing_only needs teacher_labels")
    heads = [student_head] if teacher_head is None else [student_head, teacher_head]
    vocab = max(head.vocab_size for head in heads)
    if chunk_size is None:
        cpu = student_hidden.device.type == "cpu"
        chunk_size, _ = fused_chunk(
            vocab, memory_budget_mb, heads=len(heads), compared=divergence is not None, cpu=cpu
        )
    losses = TileLosses(
        weights=LossWeights(ce_weight, teacher_ce_weight, kd_weight),
        divergence=divergence,
        temperature=temperature,
        agreeing_only=agreeing_only,
        masked=any(head.bias is not None and bool(torch.isneginf(head.bias).any()) for head in heads),
        student_scale=(student_head.scale, student_head.softcap),
        teacher_scale=(1.0, None) if teacher_head is None else (teacher_head.scale, teacher_head.softcap),
    )
    stats: dict[str, Tensor] = {}
    loss = _apply(
        (losses, chunk_size, stats),
        (student_hidden, student_head.weight, student_head.bias),
        (
            teacher_hidden,
            *((None, None) if teacher_head is None else (teacher_head.weight, teacher_head.bias)),
        ),
        (labels, teacher_labels, kd_mask),
    )
    return FusedLosses(loss, stats)


def _apply(
    settings: tuple[TileLosses, int, dict[str, Tensor]],
    student: tuple[Tensor | None, ...],
    teacher: tuple[Tensor | None, ...],
    targets: tuple[Tensor | None, ...],
) -> Tensor:
    tokens = {tensor.shape[0] for tensor in (student[0], teacher[0], *targets) if tensor is not None}
    if len(tokens) != 1:
        raise ValueError(
            f"hidden states, labels and masks must have as many tokens each, not {sorted(tokens)}"
        )
    frozen = tuple(None if tensor is None else tensor.detach() for tensor in teacher[1:])
    return _FusedDistillation.apply(  # type: ignore[no-any-return]
        settings, torch.is_grad_enabled(), *student, teacher[0], *frozen, *targets
    )


class _FusedDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: tuple[TileLosses, int, dict[str, Tensor]],
        grad_enabled: bool,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        labels: Tensor | None,
        teacher_labels: Tensor | None,
        kd_mask: Tensor | None,
    ) -> Tensor:
        losses, chunk_size, stats = settings
        needs = [need and grad_enabled for need in ctx.needs_input_grad]
        student = ChunkedHead(student_hidden, student_weight, student_bias, (needs[2], needs[3], needs[4]))
        teacher = None
        if teacher_hidden is not None and teacher_weight is not None:
            # Only its cross-entropy reaches the teacher's hidden states.
            train = needs[5] and teacher_labels is not None
            teacher = ChunkedHead(teacher_hidden, teacher_weight, teacher_bias, (train, False, False))
        tokens, device = student_hidden.shape[0], student_hidden.device
        vocab = max(side.weight.shape[0] for side in (student, teacher) if side is not None)
        rows = tile_rows(vocab, device)
        collected: dict[str, list[Tensor]] = {}
        scratch = Scratch()
        with torch.autocast(device.type, enabled=False):
            for span in spans(tokens, chunk_size):
                s = student.logits(span)
                t = None if teacher is None else teacher.logits(span)
                for inner in spans(s.shape[0], rows):
                    cut = slice(span.start + inner.start, span.start + inner.stop)
                    found = losses(
                        s[inner],
                        None if t is None else t[inner],
                        None if labels is None else labels[cut],
                        None if teacher_labels is None else teacher_labels[cut],
                        None if kd_mask is None else kd_mask[cut],
                        scratch,
                        student_grad=student.needs,
                        teacher_grad=teacher is not None and teacher.needs,
                    )
                    for name, value in found.items():
                        collected.setdefault(name, []).append(value)
                if student.needs:
                    student.backward(span, s)
                if teacher is not None and teacher.needs and t is not None:
                    teacher.backward(span, t)
                del s, t
        stats |= join_stats(collected)
        d_teacher = None
        if teacher is not None and needs[5]:
            # also where no teacher label is given, so that a projector never lacks its gradient
            d_teacher = torch.zeros_like(teacher.hidden) if teacher.d_hidden is None else teacher.d_hidden
        save_gradients(ctx, [*student.gradients(), d_teacher])
        return stats.pop("loss")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *scaled_gradients(ctx, upstream[0]), None, None, None, None, None)
