"""Sorting the rows of a matrix."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["sorted_rows"]


def sorted_rows(values: Tensor) -> Tensor:
    """Each row of ``[..., n]`` in ascending order, with a gradient to ``values``.

    On a CPU numpy sorts: its vectorised sorts take a sixth (with gradient) to a thirtieth of the
    time of PyTorch's on rows of a vocabulary's size.
    """
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.sort(-1).values
    if not (values.requires_grad and torch.is_grad_enabled()):
        return torch.from_numpy(np.sort(values.detach().numpy(), axis=-1))
    return values.gather(-1, torch.from_numpy(np.argsort(values.detach().numpy(), axis=-1)))
