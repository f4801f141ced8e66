"""SmoothQuant: per-channel scales that move difficulty from activations to weights (Xiao et al. 2023, arXiv:2211.10438, eq. 4).

Shape suffixes: C channels of a site, O out channels of all its readers together.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import PlanishError

LARGEST = 80.0  # logarithm of a scale, either way: float32 holds it and its inverse


@dataclass(frozen=True, kw_only=True, slots=True)
class Smooth:
    """Smooth every matching site that has a free host. strength: alpha of eq. 4, or auto: searched for each site
    by the error of the block's output when that site is quantized."""

    strength: float | Literal["auto"] = "auto"
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if self.strength != "auto" and not 0 <= self.strength <= 1:
            raise PlanishError(f"smooth.strength is {self.strength}, but it lies in [0, 1]. Use 0.5 to 0.85, or auto.")


def smoothing_scale(x_absmax_C: Tensor, w_absmax_C: Tensor, strength: float) -> Tensor:
    """s = max|x|^alpha / max|W|^(1 - alpha), divided by its geometric mean so that a site keeps its overall size.

    x_absmax_C, w_absmax_C: (C,). Returns (C,) positive; channels that are always zero keep 1.
    """
    alive = (x_absmax_C > 0) & (w_absmax_C > 0)
    floor = torch.finfo(torch.float32).tiny ** 0.5
    log_C = strength * x_absmax_C.float().clamp(min=floor).log() - (1 - strength) * w_absmax_C.float().clamp(min=floor).log()
    log_C = torch.where(alive, log_C, torch.zeros_like(log_C))
    if alive.any():
        log_C = torch.where(alive, log_C - log_C[alive].mean(), log_C)
    return log_C.clamp(-LARGEST, LARGEST).exp()
