"""Shifts, and OutlierTune's static scale (Wang et al. 2024, arXiv:2406.18832): what a channel always holds need not be quantized with every token.

x - z goes with the readers' bias growing by W z (`Shift`). z is the middle of a channel's range, which halves the greatest modulus of one that lies
on one side of zero, or its mean, which takes the most energy away: the one to take before a rotation, which mixes the channels' ranges anyway.

Shape suffixes: C channels of a site.
"""

import torch
from torch import Tensor

from .factors import Chain, Scale, Shift
from .smooth import LARGEST


def midrange(low_C: Tensor, high_C: Tensor) -> Shift:
    """z = (low + high) / 2, the least and the greatest value of each channel: (C,). Afterwards each range is symmetric about zero."""
    return Shift(((low_C.double() + high_C.double()) / 2).float())


def mean(sum_C: Tensor, tokens: int) -> Shift:
    """z = sum / tokens, sum_C: (C,) of each channel over the tokens. Afterwards each mean is zero."""
    return Shift((sum_C.double() / tokens).float())


def pre_executed(low_C: Tensor, high_C: Tensor, bits: int) -> Chain:
    """Symmetrised and in units of the integer grid: the shift z of `midrange`, then the divisor s = max|x - z| / (2^(bits - 1) - 1).

    With s and z absorbed by what makes the input, x arrives as numbers that need only be rounded, at a static scale of 1, and s is in the weight:
    OutlierTune's "pre-execution of dequantization". It is SmoothQuant with alpha = 1: all difficulty goes to the weight, so it suits 8-bit weights.
    A channel that never leaves its middle has the geometric mean of the others' divisors, so that its weights do not set a row's scale.
    """
    half_C = (high_C.double() - low_C.double()) / 2 / (2 ** (bits - 1) - 1)
    alive_C = half_C > 0
    log_C = torch.where(alive_C, half_C, 1.0).log()
    usual = log_C[alive_C].mean() if alive_C.any() else log_C.new_zeros(())
    return midrange(low_C, high_C), Scale(torch.where(alive_C, log_C, usual).clamp(-LARGEST, LARGEST).exp().float())
