"""What a device without float64 or sparse tensors takes instead, on a CPU that denies having them."""

from __future__ import annotations

import torch

from dskd_lightning.functional import precision

CPU = torch.device("cpu")


def test_a_cpu_has_both() -> None:
    assert precision.widest(CPU) == torch.float64
    assert precision.has_sparse(CPU)
    assert precision.summable(torch.ones(2)).dtype == torch.float64


def test_a_poor_device_sums_in_float32(poor_device: None) -> None:
    assert precision.summable(torch.ones(2)).dtype == torch.float32
    assert not precision.has_sparse(CPU)
    assert precision.float64_place(torch.device("meta")) == CPU
