"""Rounding to nearest: every weight alone goes to the closest point of its grid.

q = clamp(round(w / s + z)). The baseline of every other solver, and what they do where nothing is known about the inputs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..formats import QuantizedWeight, ScaleType, WeightFormat, code_dtype, to_codes
from .clip import Clip, fit_grid
from .moments import Moments, Solution


@dataclass(frozen=True, kw_only=True, slots=True)
class Rtn:
    """Rounding to nearest, on a grid that may be clipped. Needs no calibration."""

    needs_moments: ClassVar[bool] = False
    needs_cross: ClassVar[bool] = False
    held_share: ClassVar[float] = 0.0
    attention: ClassVar[bool] = False

    clip: Clip | None = None

    @torch.no_grad()
    def solve(self, w_OI: Tensor, fmt: WeightFormat, moments: Moments | None, scale_dtype: ScaleType) -> Solution:
        """Quantize w_OI: (out, in). moments are not looked at. Scales are rounded to scale_dtype before codes are chosen."""
        scale_OG, zero_OG = fit_grid(w_OI, fmt, self.clip, scale_dtype)
        zero_OG1 = None if zero_OG is None else zero_OG[:, :, None]
        codes_OGI = to_codes(w_OI.reshape(len(w_OI), fmt.groups(w_OI.shape[1]), -1), scale_OG[:, :, None], zero_OG1, fmt.kind)
        codes_OI = codes_OGI.flatten(1).to(code_dtype(fmt.kind))
        return Solution(weight=QuantizedWeight(codes_OI, scale_OG.float(), None if zero_OG is None else zero_OG.float(), fmt))
