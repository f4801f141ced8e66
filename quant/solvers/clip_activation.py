"""Where a token's grid ends: at its largest value, or at the clip ratio with which the outputs lose least.

c* = argmin_c |(Q_c(x) - x) W'|² = argmin_c tr(E' E Σ_w), E = Q_c(x) - x, Σ_w = W' W summed over the readers of x; c multiplies the dynamic range
[min, max] of each token (formats.ActivationFormat.clip). In FlatQuant (Sun et al. 2024, arXiv:2410.09426) learned clips are the largest gain
once the transforms are there; here they are searched.

Shape suffixes: T tokens, C channels, F candidates.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import PlanishError
from ..formats import ActivationFormat
from ..linear import quantize_input
from ..pieces import pieces

RATIOS = tuple(1 - i / 40 for i in range(13))
"""1 down to 0.7, in steps of 0.025."""


@torch.no_grad()
def clip_errors(x_TC: Tensor, readers_CC: Tensor, fmt: ActivationFormat, ratios: Sequence[float] = RATIOS) -> Tensor:
    """The squared error of the readers' outputs for each ratio: (F,) float64.

    x_TC: a sample of the input, transformed, without the tokens that are kept out of quantization. readers_CC: Σ_w.
    """
    channels = x_TC.shape[1]
    if readers_CC.shape != (channels, channels):
        raise PlanishError(f"readers_CC has shape {tuple(readers_CC.shape)}, but for an input of {channels} channels it is ({channels}, {channels}).")
    readers_CC = readers_CC.to(torch.promote_types(x_TC.dtype, torch.float32))
    return torch.stack([_error(x_TC, readers_CC, replace(fmt, clip=ratio)) for ratio in ratios])


def best_clip(x_TC: Tensor, readers_CC: Tensor, fmt: ActivationFormat, ratios: Sequence[float] = RATIOS) -> ActivationFormat:
    """fmt with the ratio that clip_errors is least for, the first of equals.

    Raises PlanishError: a static format, a ratio outside (0, 1], or an error that is not a number.
    """
    error_F = clip_errors(x_TC, readers_CC, fmt, ratios)
    if not error_F.isfinite().all():
        raise PlanishError("the clip of an activation cannot be searched: its values, or its readers' weights, hold NaN or Inf.")
    return replace(fmt, clip=ratios[int(error_F.argmin())])


def _error(x_TC: Tensor, readers_CC: Tensor, fmt: ActivationFormat) -> Tensor:
    """tr(E' E Σ_w), a scalar in float64; E is computed as the layer will."""
    quantized_TC = quantize_input(x_TC, fmt).dequantize()
    total = torch.zeros((), dtype=torch.float64, device=x_TC.device)
    for rows in pieces(x_TC):
        e_TC = quantized_TC[rows].to(readers_CC.dtype) - x_TC[rows].to(readers_CC.dtype)
        total += (e_TC @ readers_CC).mul_(e_TC).sum(dtype=torch.float64)
    return total
