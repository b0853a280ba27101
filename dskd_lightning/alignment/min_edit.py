"""Dynamic-programming alignment of two token sequences under edit distance (FuseLLM, arXiv 2401.10491)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["align_tokens"]


def align_tokens(student: Sequence[str], teacher: Sequence[str]) -> npt.NDArray[np.int64]:
    """The teacher token that each student token is aligned with one to one.

    The cheapest monotone path through the table of edit distances between tokens: it begins and
    ends with both sequences' first and last tokens and advances in one of them or in both. A token
    on several cells of the path is aligned with several others and has no partner here. Among
    equally cheap steps, advancing in both comes first, then in the student's sequence.

    Args:
        student: ``n`` token strings.
        teacher: ``m`` token strings.

    Returns:
        ``[n]``, index of a teacher token or -1.
    """
    partner = np.full(len(student), -1, np.int64)
    if not len(student) or not len(teacher):
        return partner
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    unique = [np.unique(np.asarray(side, object), return_inverse=True) for side in (student, teacher)]
    distances = cdist(list(unique[0][0]), list(unique[1][0]), scorer=Levenshtein.distance, dtype=np.int32)
    path = _cheapest_path(distances[np.ix_(unique[0][1], unique[1][1])])
    rows, columns = path[:, 0], path[:, 1]
    single = (np.bincount(rows)[rows] == 1) & (np.bincount(columns)[columns] == 1)
    partner[rows[single]] = columns[single]
    return partner


def _cheapest_path(cost: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Cells ``[length, 2]`` of the cheapest path from the first to the last corner of ``cost``.

    Cells on one anti-diagonal depend on the two before it only and are computed together.
    """
    n, m = cost.shape
    far = np.int64(1) << 40
    total = np.full((n + 1, m + 1), far, np.int64)
    total[0, 0] = 0
    for diagonal in range(n + m - 1):
        i = np.arange(max(0, diagonal - m + 1), min(n, diagonal + 1))
        j = diagonal - i
        reached = np.minimum(np.minimum(total[i, j], total[i, j + 1]), total[i + 1, j])
        total[i + 1, j + 1] = cost[i, j] + reached
    i, j = n - 1, m - 1
    cells = [(i, j)]
    while i or j:
        steps = (total[i, j], total[i, j + 1], total[i + 1, j])
        best = int(np.argmin(steps))
        i, j = i - (best != 2), j - (best != 1)
        cells.append((i, j))
    return np.array(cells[::-1])
