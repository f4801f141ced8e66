"""Outliers of the hidden states.

Massive activations (Sun, Chen, Kolter and Liu, "Massive Activations in Large Language Models", COLM 2024): a few values, thousands of times
larger than the rest, in fixed channels of the first token and of some delimiters. They are biases that hardly depend on the text, and the
tokens that hold them are attention sinks. So these tokens say nothing of the range of ordinary ones and are kept out of scales
and of a Hessian's damping.

Shape suffixes: T tokens, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...quant.errors import PlanishError

_MEDIAN_VALUES = 1 << 14


@dataclass(frozen=True, kw_only=True, slots=True)
class MassiveCriterion:
    """h is massive if |h| > floor and |h| >= ratio * median(|h|). The defaults are the paper's."""

    floor: float = 100.0
    ratio: float = 1000.0

    def __post_init__(self) -> None:
        for name, value in (("floor", self.floor), ("ratio", self.ratio)):
            if not value > 0:
                raise PlanishError(f"massive.{name} is {value}, but must be positive.")


PAPER = MassiveCriterion()


@torch.no_grad()
def massive(h_TC: Tensor, criterion: MassiveCriterion = PAPER) -> Tensor:
    """Which tokens hold a massive activation: (T,) bool. h_TC: (T, C), any float type.

    Equivalent to ((h.abs() > floor) & (h.abs() >= ratio * h.abs().median())).any(1); of more than 2^14 values the median is that of evenly
    spaced tokens. Raises PlanishError if h is not finite.
    """
    if not h_TC.numel():
        return torch.zeros(len(h_TC), dtype=torch.bool, device=h_TC.device)
    low, high = h_TC.aminmax()  # one quick pass, and mostly the only one
    if -criterion.floor <= float(low) and float(high) <= criterion.floor:
        return torch.zeros(len(h_TC), dtype=torch.bool, device=h_TC.device)
    peak_T = torch.maximum(h_TC.amax(1), -h_TC.amin(1)).float()
    if not bool(torch.isfinite(peak_T).all()):
        token = int((~torch.isfinite(peak_T)).nonzero()[0])
        raise PlanishError(f"The hidden state of token {token} is not finite. Run the model in bfloat16 or float32, and check its weights.")
    massive_T = peak_T > criterion.floor
    if not bool(massive_T.any()):
        return massive_T
    stride = -(-h_TC.numel() // _MEDIAN_VALUES)
    return massive_T & (peak_T >= criterion.ratio * h_TC[::stride].float().abs().median())
