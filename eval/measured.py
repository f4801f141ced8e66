"""What was measured of a model by the names that gates and logs have for it."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from .check import Figure
from .score import Comparison

COMPARED = ("perplexity", "perplexity_ratio", "kl", "agreement")
"""What a comparison with the original model measures."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A value with its standard error, where there is one."""

    value: float
    error: float | None = None


def comparison_metrics(found: Comparison) -> dict[str, Measured]:
    """COMPARED, of a comparison."""
    ratio = math.exp(min(found.quantized.nll - found.base.nll, 700))
    return {
        "perplexity": Measured(found.quantized.perplexity),
        "perplexity_ratio": Measured(ratio, _ratio_error(found, ratio)),
        "kl": Measured(found.kl),
        "agreement": Measured(found.agreement),
    }


def _ratio_error(found: Comparison, ratio: float) -> float | None:
    """Of exp of the mean difference of windows, to first order; windows are independent, tokens in one are not."""
    differences = [after - before for before, after in zip(found.base.windows, found.quantized.windows, strict=True)]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    return ratio * statistics.stdev(differences) / math.sqrt(len(differences))


def figures_metrics(figures: Mapping[str, Figure]) -> dict[str, Measured]:
    """COMPARED, of the figures of verify's check `against`."""
    base, after = (float(figures[name] or math.nan) for name in ("perplexity_base", "perplexity"))
    return {
        "perplexity": Measured(after),
        "perplexity_ratio": Measured(after / base),
        **{name: Measured(float(figures[name] or 0)) for name in ("kl", "agreement")},
    }
