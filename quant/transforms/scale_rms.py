"""A per-channel scale from second moments: CAT with blocks of one channel (arXiv:2603.04359), shrunk.

What SmoothQuant takes from maxima, root mean squares say better where a rotation follows: it is the energy of a channel that the rotation spreads.
Of x / s and W * s with s = sqrt(rms_x / rms_w), every channel has the same root mean square in both, up to a factor shared by all.

Shape suffixes: C channels of a site.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import PlanishError
from .smooth import LARGEST


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleRms:
    """Scale every matching site that has a free host. exponent: as of `rms_scale`, or auto: searched for each site
    by the error of the block's output when that site is quantized, rotated as the steps behind say."""

    exponent: float | Literal["auto"] = "auto"
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if self.exponent != "auto" and not 0 <= self.exponent <= 1:
            raise PlanishError(f"scale_rms.exponent is {self.exponent}, but it lies in [0, 1]. Use 0.5, or auto.")


def rms_scale(second_x_C: Tensor, second_w_C: Tensor, exponent: float) -> Tensor:
    """s = (rms_x / rms_w)^(exponent / 2), divided by its geometric mean so that a site keeps its overall size.

    second_x_C, second_w_C: (C,) the diagonals of X' X and of W' W over all readers, sums or means. exponent: 0 leaves all as it is, 1 is CAT's.
    Returns (C,) positive float32, for a `Scale`; channels that are always zero keep 1.
    """
    alive_C = (second_x_C > 0) & (second_w_C > 0)
    ratio_C = torch.where(alive_C, second_x_C.double(), 1.0).log() - torch.where(alive_C, second_w_C.double(), 1.0).log()
    log_C = exponent / 4 * ratio_C
    if alive_C.any():
        log_C = torch.where(alive_C, log_C - log_C[alive_C].mean(), 0.0)
    return log_C.clamp(-LARGEST, LARGEST).exp().float()
