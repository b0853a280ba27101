"""Reading checkpoints whose optimizer states are tensor subclasses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO

__all__ = ["CPUCheckpointIO"]


class CPUCheckpointIO(TorchCheckpointIO):
    """Reads checkpoints to the CPU, as Lightning does, but says so by name.

    PyTorch can't rebuild tensor subclasses, such as the states of torchao's 8-bit optimizers,
    where a function maps devices.
    """

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return super().load_checkpoint(path, "cpu", weights_only)  # type: ignore[arg-type]
