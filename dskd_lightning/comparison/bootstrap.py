"""Statistics of paired differences: bootstrap interval, sign-flip test, Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dskd_lightning.errors import UserError
from dskd_lightning.runs.heartbeat import Heartbeat

__all__ = ["PairedTest", "bootstrap_interval", "holm", "paired_test", "sign_flip_p_value"]

_BLOCK = 2_000_000  # numbers drawn at once, 16 MB


@dataclass(frozen=True)
class PairedTest:
    """Mean difference with its interval; ``p_value`` is two-sided.

    Args:
        mean: mean of the differences.
        low: lower end of the bootstrap interval.
        high: upper end.
        p_value: of the sign-flip permutation test that the differences are symmetric around 0.
        confidence: coverage of the interval.
        count: number of pairs.
    """

    mean: float
    low: float
    high: float
    p_value: float
    confidence: float
    count: int


def paired_test(
    differences: ArrayLike, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> PairedTest:
    """Interval and p-value of the mean of paired differences ``[pairs]``.

    Raises:
        UserError: fewer than two pairs, or a confidence outside (0, 1).
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or values.size < 2:
        raise UserError(f"a paired comparison needs at least 2 prompts, not {values.size}.")
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be between 0 and 1, not {confidence}.")
    with Heartbeat(lambda: f"{resamples:,} resamples of {values.size:,} differences", seconds=10):
        low, high = bootstrap_interval(values, resamples=resamples, confidence=confidence, seed=seed)
        p_value = sign_flip_p_value(values, resamples=resamples, seed=seed)
    return PairedTest(float(values.mean()), low, high, p_value, confidence, values.size)


def bootstrap_interval(
    values: NDArray[np.float64], *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values [n]``."""
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[generator.integers(0, values.size, (rows, values.size))].mean(axis=1)
            for rows in _blocks(resamples, values.size)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def sign_flip_p_value(values: NDArray[np.float64], *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the mean of ``values [n]`` under random signs.

    Counts the observed assignment itself, so that the p-value is never 0 and the test is valid.
    """
    generator = np.random.default_rng(seed)
    observed = abs(values.mean()) - 1e-12
    extreme = 0
    for rows in _blocks(resamples, values.size):
        signs = generator.integers(0, 2, (rows, values.size), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ values / values.size) >= observed).sum())
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values of several comparisons, in the given order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def _blocks(resamples: int, size: int) -> list[int]:
    rows = max(1, _BLOCK // size)
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]
