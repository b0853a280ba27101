"""Time and memory of one divergence of two heads: ours, Liger's fused form and the plain one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from _measure import Memory, timed
from torch import Tensor

from dskd_lightning.functional import JensenShannon, fused_distillation
from dskd_lightning.structures import Head

from .setup import Setup


def checks(setup: Setup) -> Iterator[tuple[str, Callable[[], str]]]:
    for vocabulary in (1000,) if setup.small else (32_000, 152_000):
        yield f"JSD beside Liger's, {vocabulary:,}", partial(beside, setup, vocabulary)


def beside(setup: Setup, vocabulary: int) -> str:
    """Loss and gradients of student states and head, as in full fine-tuning with a frozen teacher."""
    tokens, d, e, dtype = (64, 16, 24, torch.float32) if setup.small else (4096, 896, 2048, torch.bfloat16)
    torch.manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=setup.device).mul_(columns**-0.5).to(dtype)

    # Apart enough for the losses to say something, in range of half precision.
    h, w = (4 * random(tokens, d)).requires_grad_(), (4 * random(vocabulary, d)).requires_grad_()
    t, tw = 4 * random(tokens, e), 4 * random(vocabulary, e)
    divergence = JensenShannon(0.5)

    def ours() -> Tensor:
        found = fused_distillation(
            h, Head(w), teacher_hidden=t, teacher_head=Head(tw), divergence=divergence, ce_weight=0.0
        )
        return found.loss

    def plain() -> Tensor:
        return divergence(h @ w.T, t @ tw.T).sum()

    forms = {"ours": ours, "plain": plain}
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ModuleNotFoundError:
        missing = "; liger-kernel isn't installed"
    else:
        fused = LigerFusedLinearJSD(jsd_beta=0.5)
        forms["Liger"], missing = lambda: fused(h, w, t, tw) * tokens, ""
    parts, losses = [], {}
    for name, form in forms.items():

        def step(form: Callable[[], Tensor] = form) -> Tensor:
            h.grad = w.grad = None
            loss = form()
            loss.backward()
            return loss.detach()

        losses[name] = float(step())
        memory = Memory()
        seconds = sorted(timed(step, 1 if setup.small else 5))
        parts.append(f"{name} {1000 * seconds[len(seconds) // 2]:.1f} ms {memory.extra:,.0f} MiB")
    for name, loss in losses.items():
        apart = abs(loss / losses["plain"] - 1)
        assert apart < (1e-4 if dtype == torch.float32 else 3e-2), (
            f"{name}: {loss:g}, plain {losses['plain']:g}"
        )
    return "; ".join(parts) + missing
