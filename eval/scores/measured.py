"""A comparison with the original model, by the names that gates and logs have for what was measured."""

from collections.abc import Mapping

from .check import Figure
from .paired import Measured, mean
from .score import Comparison, exponential

COMPARED = ("perplexity", "perplexity_ratio", "kl", "agreement")
"""What a comparison with the original model measures."""


def comparison_metrics(found: Comparison) -> dict[str, Measured]:
    """COMPARED, of a comparison. The ratio's error is paired and over windows, to first order."""
    worse = mean([after - before for before, after in zip(found.base.windows, found.quantized.windows, strict=True)])
    ratio = exponential(worse.value)
    return {
        "perplexity": Measured(value=found.quantized.perplexity),
        "perplexity_ratio": Measured(value=ratio, error=None if worse.error is None else ratio * worse.error),
        "kl": Measured(value=found.kl),
        "agreement": Measured(value=found.agreement),
    }


def figures_metrics(figures: Mapping[str, Figure]) -> dict[str, Measured]:
    """COMPARED, of the figures of verify's check `against`, which have no errors."""
    values = {name: float(figures[name] or 0) for name in ("perplexity_base", "perplexity", "kl", "agreement")}
    values["perplexity_ratio"] = values["perplexity"] / values["perplexity_base"]
    return {name: Measured(value=values[name]) for name in COMPARED}
