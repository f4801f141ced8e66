"""Errors of paired samples, against the textbook and against resampling."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from planish.eval.scores.paired import Measured, average, difference, flips, mean, ratio

RANDOM = np.random.default_rng(0)
Y = RANDOM.integers(0, 2, 200).astype(float)
X = np.where(RANDOM.random(200) < 0.1, 1 - Y, Y)


def test_mean_has_the_error_of_the_binomial() -> None:
    found, share = mean(list(X)), float(X.mean())
    assert found.value == share
    assert found.error == pytest.approx(math.sqrt(share * (1 - share) / 199))
    assert mean([3.0]) == Measured(value=3.0, error=None)


def test_difference_is_that_of_the_paired_t_test() -> None:
    found = difference(list(X), list(Y))
    assert found.error is not None
    assert found.value == pytest.approx(X.mean() - Y.mean())
    assert found.value / found.error == pytest.approx(ttest_rel(X, Y).statistic)
    separate = math.hypot(mean(list(X)).error or 0, mean(list(Y)).error or 0)
    assert found.error < separate / 2


def test_ratio_has_the_error_that_resampling_finds() -> None:
    found = ratio(list(X), list(Y))
    assert found is not None
    drawn = RANDOM.integers(0, 200, (4000, 200))
    resampled = X[drawn].mean(1) / Y[drawn].mean(1)
    assert found.value == X.sum() / Y.sum()
    assert found.error == pytest.approx(resampled.std(), rel=0.1)
    assert ratio(list(-X), list(-Y)) == found


def test_ratio_of_nothing() -> None:
    assert ratio([1.0, 0.0], [0.0, 0.0]) is None
    assert ratio([2.0], [4.0]) == Measured(value=0.5, error=None)


def test_flips_are_counted_and_tested_exactly() -> None:
    """One lost and five gained of ten: twice the binomial tail (1 + 6) / 64."""
    found = flips([0, 1, 1, 1, 1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 1, 1, 0])
    assert (found.lost, found.gained) == (1, 5)
    assert found.p_value == pytest.approx(2 * 7 / 64)


def test_no_flips() -> None:
    assert flips([1, 0], [1, 0]).p_value == 1
    assert flips([1, 0], [0, 1]).p_value == 1


def test_average_adds_errors_as_independent() -> None:
    assert average([Measured(value=90.0, error=3.0), Measured(value=110.0, error=4.0)]) == Measured(value=100.0, error=2.5)
    assert average([Measured(value=90.0, error=3.0), Measured(value=110.0)]) == Measured(value=100.0, error=None)
    assert average([]) is None
