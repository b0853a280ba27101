"""The sparse product stays in float32 under autocast, where GPUs have none in half precision."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dskd_lightning.objectives.xtoken import _SparseProduct


class SparseTypes(TorchDispatchMode):
    """Types of what meets a sparse matrix in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if "mm" in func.__name__ and any(t.layout == torch.sparse_coo for t in tensors):
            self.types |= {t.dtype for t in tensors}
        return func(*args, **(kwargs or {}))


def test_forward_and_backward_are_the_dense_products_in_float32_inside_autocast() -> None:
    torch.manual_seed(0)
    dense = torch.randn(5, 7) * (torch.rand(5, 7) < 0.4)
    q = torch.rand(3, 7, requires_grad=True)
    seen = SparseTypes()
    with torch.autocast("cpu", dtype=torch.bfloat16), seen:
        out = _SparseProduct.apply(dense.to_sparse_coo(), q)
        (gradient,) = torch.autograd.grad((out * torch.arange(5.0)).sum(), [q])
    assert seen.types == {torch.float32}
    torch.testing.assert_close(out, q @ dense.T)
    torch.testing.assert_close(gradient, (torch.arange(5.0) @ dense).expand(3, 7))
