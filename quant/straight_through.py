"""Rounding that descent can pass through: what a grid makes of values, with the straight-through gradient (Bengio et al. 2013, arXiv:1308.3432).

Rounding counts as the identity where a value lies within the grid; scales are functions of the range and the clip, zero points are constants.

Shape suffixes: T tokens, C = I channels, O out channels, G groups.
"""

from torch import Tensor

from .formats import ActivationFormat, Kind, WeightFormat, by_group, code_range, nearest, scale_and_zero, weight_range


def rounded_input(x_TC: Tensor, fmt: ActivationFormat, clip: Tensor) -> Tensor:
    """What dynamic codes make of x_TC: (T, C), differentiable with respect to x_TC and to clip, a scalar that stands for the format's.

    Equivalent to quantize_input(x_TC, replace(fmt, clip=clip)).dequantize().
    """
    groups = 1 if fmt.granularity == "tensor" else x_TC.shape[1] // (fmt.group_size or x_TC.shape[1])
    x_TGC = by_group(x_TC, groups)
    over = (0, 1, 2) if fmt.granularity == "tensor" else (2,)
    return _on_grid(x_TGC, x_TGC.amin(over, keepdim=True) * clip, x_TGC.amax(over, keepdim=True) * clip, fmt.kind, fmt.symmetric).flatten(1)


def rounded_weight(w_OI: Tensor, fmt: WeightFormat, clip: Tensor) -> Tensor:
    """What codes make of a weight, rounded to nearest: (O, I), differentiable with respect to w_OI and to clip, the part of each range that the grid
    covers: a scalar, or broadcast against (O, G).

    Equivalent to Rtn's weight, dequantized, where clip is 1.
    """
    low_OG, high_OG = (end * clip for end in weight_range(w_OI, fmt))
    w_OGI = by_group(w_OI, low_OG.shape[1])
    return _on_grid(w_OGI, low_OG[:, :, None], high_OG[:, :, None], fmt.kind, fmt.symmetric).flatten(1)


def _on_grid(x: Tensor, low: Tensor, high: Tensor, kind: Kind, symmetric: bool) -> Tensor:
    scale, zero = scale_and_zero(low, high, kind, symmetric)
    steps = x / scale if zero is None else x / scale + zero.detach()
    at = steps.detach()
    codes = (steps + ((at.round() if isinstance(kind, int) else nearest(at.clone(), kind)) - at)).clamp(*code_range(kind))
    return (codes if zero is None else codes - zero.detach()) * scale
