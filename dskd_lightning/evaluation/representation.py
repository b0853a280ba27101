"""How alike two models' hidden states are; pure functions of tensors.

Structure distances compare the token-by-token self-similarity of one response under two models
(Figure 4 of arXiv 2406.17328), so that hidden sizes may differ but tokens may not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dskd_lightning.errors import UserError
from dskd_lightning.functional.precision import summable

__all__ = [
    "cosine_structure_distance",
    "inner_product_structure_distance",
    "linear_cka",
]


def cosine_structure_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of the two cosine self-similarity matrices.

    Args:
        student: ``[tokens, student hidden]`` of one response.
        teacher: ``[tokens, teacher hidden]`` of the same tokens.

    Returns:
        Scalar in [0, 2].

    Raises:
        UserError: the numbers of tokens differ.
    """
    return (_cosine(_checked(student, teacher)) - _cosine(teacher)).abs().mean()


def inner_product_structure_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """L1 distance of rows of the inner-product matrices, each row divided by its sum; mean over rows.

    Args:
        student: ``[tokens, student hidden]`` of one response.
        teacher: ``[tokens, teacher hidden]`` of the same tokens.

    Raises:
        UserError: the numbers of tokens differ.
    """
    return (_row_share(_checked(student, teacher)) - _row_share(teacher)).abs().sum(dim=-1).mean()


def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Linear centred kernel alignment (arXiv 1905.00414), 1 for equal up to rotation and scale.

    Args:
        student: ``[tokens, student hidden]``, of any number of responses.
        teacher: ``[tokens, teacher hidden]`` of the same tokens.

    Raises:
        UserError: the numbers of tokens differ.
    """
    x = summable(_checked(student, teacher))
    y = summable(teacher)
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    cross = torch.linalg.matrix_norm(x.T @ y) ** 2
    return cross / (torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y))


def _cosine(hidden: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(summable(hidden), dim=-1)
    return unit @ unit.T


def _row_share(hidden: Tensor) -> Tensor:
    products = summable(hidden) @ summable(hidden).T
    return products / products.sum(dim=-1, keepdim=True)


def _checked(student: Tensor, teacher: Tensor) -> Tensor:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise UserError(
            f"hidden states of the same tokens are needed, got {list(student.shape)} and "
            f"{list(teacher.shape)}; models with different tokenizers must be compared at aligned positions."
        )
    return student
