"""What is logged of an optimiser step besides its losses."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dskd_lightning.ranks import whole

__all__ = ["forget_other_figures", "gradient_norms", "on_host"]


def gradient_norms(student: nn.Module, objectives: nn.Module) -> dict[str, Tensor]:
    """Norms before clipping, of the student's part and of the objectives' (projectors)."""
    norms = {}
    for name, part in (("student", student), ("projectors", objectives)):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        if gradients:
            norms[f"monitor/gradient_norm_{name}"] = whole(get_total_norm(gradients)).float()
    return norms


def forget_other_figures(trainer: L.Trainer, values: Mapping[str, object]) -> None:
    """Lightning would log what a step doesn't have as the last one had it, until the epoch ends."""
    results = trainer._results
    if results is not None:
        names = {key: metric.meta.name for key, metric in results.items()}
        for key in [key for key, name in names.items() if name.startswith("train/") and name not in values]:
            del results[key]


def on_host(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars in host memory, brought there by one copy: Lightning would wait for the device at each."""
    if not values:
        return {}
    return dict(zip(values, torch.stack([value.float() for value in values.values()]).cpu(), strict=True))
