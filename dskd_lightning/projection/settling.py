"""Parts that take in what a whole optimiser step had, whatever number of batches and ranks that takes."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

__all__ = ["Settling"]


@runtime_checkable
class Settling(Protocol):
    """A module that changes once an optimiser step, apart from what the optimiser does."""

    def measure_whole_step(self) -> None:
        """Wait for `settle`, instead of changing with each batch."""

    def settle(self) -> None:
        """Take in the step's batches; called after its last backward, before the optimiser's step."""
