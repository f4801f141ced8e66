"""Two models on the same samples: what changed, how surely, and what share was kept.

x: the compressed model's scores, y: the base model's, in one order.

Standard errors are of means over n samples that are taken for independent. A difference is paired: its error is that of the mean of x_i - y_i, far
smaller than two separate errors would say, for most answers do not change. A ratio R = mean(x) / mean(y) has the error of the delta method (Cochran,
Sampling Techniques, 1977, section 6.4): that of the mean of x_i - R y_i, divided by mean(y). None is drawn at random, so all are reproducible.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr  # not scipy.stats: 25 MB of memory in every process


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A figure. error: its standard error, None where it has none (a single sample)."""

    value: float
    error: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Flips:
    """Answers that changed. lost: right before, wrong now; gained: wrong before, right now. p_value: McNemar's exact test, two-sided: how likely a
    change at least that lopsided were if each changed answer fell either way by a fair coin."""

    lost: int
    gained: int
    p_value: float


def mean(x: Sequence[float]) -> Measured:
    """The mean and its standard error, as lm-evaluation-harness has it: the sample deviation (n - 1) over the root of n."""
    values = np.asarray(x, dtype=np.float64)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Measured(value=float(values.mean()), error=error)


def difference(x: Sequence[float], y: Sequence[float]) -> Measured:
    """mean(x) - mean(y), with the error of paired samples."""
    return mean([a - b for a, b in zip(x, y, strict=True)])


def ratio(x: Sequence[float], y: Sequence[float]) -> Measured | None:
    """sum(x) / sum(y), with the delta method's error; None where y adds up to zero."""
    total = math.fsum(y)
    if not total:
        return None
    value = math.fsum(x) / total
    left = mean([a - value * b for a, b in zip(x, y, strict=True)]).error
    return Measured(value=value, error=None if left is None else left * len(y) / abs(total))


def flips(x: Sequence[float], y: Sequence[float]) -> Flips:
    """Of right (1) and wrong (0) answers (McNemar, Psychometrika 12, 1947; exact: the binomial distribution of one kind among both)."""
    lost = sum(1 for a, b in zip(x, y, strict=True) if a < b)
    gained = sum(1 for a, b in zip(x, y, strict=True) if a > b)
    return Flips(lost=lost, gained=gained, p_value=min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5))))


def average(figures: Sequence[Measured]) -> Measured | None:
    """The mean of independent figures; None of none."""
    if not figures:
        return None
    errors = [figure.error for figure in figures if figure.error is not None]
    error = math.sqrt(math.fsum(error**2 for error in errors)) / len(figures) if len(errors) == len(figures) else None
    return Measured(value=math.fsum(figure.value for figure in figures) / len(figures), error=error)
