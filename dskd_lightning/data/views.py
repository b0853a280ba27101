"""The raw examples of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from dskd_lightning.data.examples import Example
from dskd_lightning.data.prepared import PreparedDataset

__all__ = ["ExampleView"]


class ExampleView(Sequence[Example]):
    """Examples of one stage in the order of the data, read from disk when asked for.

    Args:
        dataset: the prepared dataset.
        indices: its rows that belong to the stage; `DistillationBatch.examples` holds such rows.
    """

    def __init__(self, dataset: PreparedDataset, indices: npt.NDArray[np.intp]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> ExampleView: ...
    def __getitem__(self, index: int | slice) -> Example | ExampleView:
        if isinstance(index, slice):
            return ExampleView(self.dataset, self.indices[index])
        return self.row(int(self.indices[index]))

    def row(self, row: int) -> Example:
        """The example in ``row`` of the dataset, as a batch numbers it."""
        return self.dataset.example(row)
