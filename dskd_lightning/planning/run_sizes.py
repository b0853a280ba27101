"""The numbers that the calculator starts from, read off a parsed run whose data are prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dskd_lightning.data import InstructionDataModule
from dskd_lightning.data.batching import BatchPlan
from dskd_lightning.functional.chunking import DEFAULT_BUDGET_MB
from dskd_lightning.objectives import Objective
from dskd_lightning.planning.calculator import DataSize, Layout, Losses, ModelSize
from dskd_lightning.strategies import DSKDModelParallelStrategy

__all__ = ["data_size", "layout_of", "losses_of", "optimizer_states", "padded_tokens"]

_TRIED = 4096  # weights that an optimizer is tried on


def data_size(data: InstructionDataModule) -> DataSize:
    """One epoch of the training data; ``epochs`` is left at 1.

    With a limit on the disk all files are taken to be as the first one.
    """
    plan, dataset = data.train_plan(), data.examples("train").dataset
    rows, lengths = plan.examples.numpy(), dataset.lengths
    padded = padded_tokens(plan, lengths[:, 0])
    raw = (dataset.folder / "examples.arrow").stat().st_size
    size = DataSize(
        examples=len(rows),
        tokens=int(lengths[rows, 0].sum(dtype=np.int64)),
        responses=int(dataset.response_tokens()[rows].sum()),
        padded=int(padded.sum()),
        batches=len(plan),
        largest=int(padded.max()),
        teacher_tokens=int(lengths[rows, 1].sum(dtype=np.int64)) if lengths.shape[1] > 1 else None,
        raw_bytes=round(raw * len(rows) / len(dataset)),
    )
    if data.rolling is None:
        return size
    job = data.rolling.job
    return replace(size.scaled(size.examples * len(job.sources)), disk_limit=job.limit)


def padded_tokens(plan: BatchPlan, lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """``[batches]``, rows times the longest row of each batch."""
    starts = plan.rows.numpy().astype(np.int64)
    totals = np.concatenate([[0], np.cumsum(lengths[plan.examples.numpy()], dtype=np.int64)])
    width = totals[starts[1:]] - totals[starts[:-1]]
    batches = plan.batches.numpy().astype(np.int64)
    longest = np.maximum.reduceat(width, batches[:-1])
    padded: npt.NDArray[np.int64] = np.diff(batches) * longest
    return padded


def losses_of(objectives: Sequence[Objective], student: ModelSize, teachers: Sequence[ModelSize]) -> Losses:
    """What the objectives hold together, one per teacher; the first one's kind is taken for all."""
    pairs = list(zip(objectives, teachers, strict=False))
    made = [objective.projector_parameters(student.hidden, t.hidden) for objective, t in pairs]
    # `HeadMap`: an inverse in float64 and the map itself.
    maps = [8 * t.hidden**2 + 4 * t.hidden * student.hidden for o, t in pairs if o.keeps_teacher_head]
    budget = max(getattr(o, "memory_budget_mb", DEFAULT_BUDGET_MB) for o in objectives)
    asks = any(objective.needs_teacher for objective in objectives)
    kind: Literal["sft", "logits", "dual"] = "dual" if sum(made) else "logits" if asks else "sft"
    further = objectives[0].further_head_products()
    return Losses(kind, sum(made), sum(maps), budget * 2**20, *further)


def layout_of(trainer: Any, module: Any, data: InstructionDataModule, mixed: bool, cuda: bool) -> Layout:
    """Devices and what each keeps, as the run's Trainer has them.

    Raises:
        UserError: the ranks can't be shared out like this.
    """
    strategy, cache = trainer.strategy, data.teacher_cache
    sharded = isinstance(strategy, DSKDModelParallelStrategy)
    return Layout(
        ranks=trainer.num_nodes * trainer.num_devices,
        sharded=sharded,
        replicas=strategy.replicas if sharded else 1,
        mixed=mixed,
        checkpointing=module.student_spec.gradient_checkpointing,
        cached=cache is not None,
        codec="bfloat16" if cache is None else cache.dtype,
        states=optimizer_states(module._optimizer),
        accumulate=trainer.accumulate_grad_batches,
        cuda=cuda,
    )


def optimizer_states(make: Callable[[Any], torch.optim.Optimizer]) -> float:
    """Numbers as wide as a weight that an optimizer keeps of each, tried out; 2 where it can't step here."""
    weight = nn.Parameter(torch.zeros(_TRIED))
    weight.grad = torch.zeros(_TRIED)
    try:
        optimizer = make([weight])
        optimizer.step()
    except Exception:  # whatever one that only runs on a GPU raises
        return 2.0
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(v.nbytes for v in kept if v.numel() > 1) / weight.nbytes
