from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from dskd_lightning.comparison.bootstrap import holm, paired_test, sign_flip_p_value
from dskd_lightning.errors import UserError


@pytest.fixture
def differences() -> np.ndarray:
    return np.random.default_rng(3).gamma(2.0, 1.0, 80) - 1.7


def test_interval_is_scipys(differences) -> None:
    ours = paired_test(differences, resamples=20_000)
    theirs = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    )
    tolerance = 0.05 * differences.std() / np.sqrt(differences.size) * 2
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=tolerance)
    assert ours.mean == pytest.approx(differences.mean())


@pytest.mark.parametrize("shift", [0.0, 0.15, -0.3])
def test_p_value_is_scipys(differences, shift) -> None:
    values = differences + shift
    theirs = stats.permutation_test(
        (values, np.zeros_like(values)), lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples", vectorized=True, n_resamples=20_000, rng=np.random.default_rng(1),
    )  # fmt: skip
    assert sign_flip_p_value(values, resamples=20_000) == pytest.approx(theirs.pvalue, abs=0.015)


def test_p_value_against_all_sign_assignments() -> None:
    values = np.array([1.0, 2.0, -0.5, 3.0, 0.7, 1.1, -0.2, 0.9])
    means = [abs(np.mean(values * signs)) for signs in itertools.product([1, -1], repeat=8)]
    exact = np.mean(np.array(means) >= values.mean() - 1e-12)
    assert sign_flip_p_value(values, resamples=50_000) == pytest.approx(exact, abs=0.005)


def test_no_difference_is_no_evidence_and_results_repeat() -> None:
    assert paired_test(np.zeros(10)).p_value == 1.0
    values = np.random.default_rng(0).normal(size=30)
    assert paired_test(values) == paired_test(values)
    assert paired_test(values, seed=1) != paired_test(values)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_bad_input() -> None:
    with pytest.raises(UserError, match="at least 2 prompts"):
        paired_test([1.0])
    with pytest.raises(UserError, match="between 0 and 1"):
        paired_test([1.0, 2.0], confidence=95)
