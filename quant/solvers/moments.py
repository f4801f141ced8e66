"""What a solver is told about its inputs, and what it answers.

Shape suffixes: O out channels, I in channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import PlanishError
from ..formats import QuantizedWeight


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moments:
    """Second moments of a linear layer's input over `tokens` calibration tokens.

    second_II: (I, I) sum of x^T x, x the input at run time (H of GPTQ; its scale does not matter).
    cross_II: (I, I) sum of (x_full - x)^T x, x_full the input in the full-precision model (D of GPTAQ); None if only one stream was run.
    ordinary: the share of second_II's trace that ordinary tokens make; the rest is of sink tokens, and damping is relative to the ordinary share,
    so that a massive activation protects its own weights without drowning the others in damping.
    held_out: moments of other text, by which a solver's settings are chosen; it is in none of the above. None where nothing is to be chosen.
    """

    second_II: Tensor
    tokens: int
    cross_II: Tensor | None = None
    ordinary: float = 1.0
    held_out: "Moments | None" = None

    def __post_init__(self) -> None:
        channels = self.second_II.shape[0]
        for name, matrix in (("second_II", self.second_II), ("cross_II", self.cross_II)):
            if matrix is not None and matrix.shape != (channels, channels):
                raise PlanishError(f"moments.{name} has shape {tuple(matrix.shape)}, but should be ({channels}, {channels}).")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Solution:
    """A quantized weight and how it was reached.

    damping: relative damping really used, 0 where the solver has none; inf: no damping helped and the Hessian
    was left out, which is rounding to nearest.
    repairs: how often the damping had to be raised.
    settings, judged: as in search.Choice, where held-out text chose the solver's settings.
    """

    weight: QuantizedWeight
    damping: float = 0.0
    repairs: int = 0
    settings: Mapping[str, float] = field(default_factory=dict)
    judged: Mapping[str, float] = field(default_factory=dict)


def require_moments(solver: str, moments: Moments | None, in_channels: int) -> Moments:
    """The moments, or a PlanishError if there are none or they are of another layer."""
    if moments is None:
        raise PlanishError(f"solver {solver} needs second moments of the layer's input. Add a calibration section, or choose solver rtn.")
    if moments.second_II.shape[0] != in_channels:
        raise PlanishError(f"solver {solver}: moments of {moments.second_II.shape[0]} channels for a weight with {in_channels} input channels.")
    return moments
