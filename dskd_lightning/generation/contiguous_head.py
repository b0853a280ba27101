"""What the head reads while a model writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["contiguous_head"]


@contextmanager
def contiguous_head(model: PreTrainedModel) -> Iterator[None]:
    """The head reads states that lie side by side.

    Of prompts only the last states are read, a slice whose rows lie apart. With a frozen head `torch.matmul`
    makes that one product per row, for which a CPU copies the head as often as there are rows.
    """
    head: Any = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(_contiguous)
    try:
        yield
    finally:
        hook.remove()


def _contiguous(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.contiguous() if isinstance(one, Tensor) else one for one in given)
