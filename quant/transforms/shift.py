"""Shifts (OutlierTune, Wang et al. 2024, arXiv:2406.18832): what a channel always holds need not be quantized with every token.

x - z goes with the readers' bias growing by W z (`Shift`). z is the middle of a channel's range, which halves the greatest modulus of one that lies
on one side of zero, or its mean, which takes the most energy away: the one to take before a rotation, which mixes the channels' ranges anyway.

Shape suffixes: C channels of a site.
"""

from torch import Tensor

from .factors import Shift


def midrange(low_C: Tensor, high_C: Tensor) -> Shift:
    """z = (low + high) / 2, the least and the greatest value of each channel: (C,). Afterwards each range is symmetric about zero."""
    return Shift(((low_C.double() + high_C.double()) / 2).float())
