"""A per-channel scale from second moments: CAT with blocks of one channel (arXiv:2603.04359), shrunk.

What SmoothQuant takes from maxima, root mean squares say better where a rotation follows: it is the energy of a channel that the rotation spreads.
Of x / s and W * s with s = sqrt(rms_x / rms_w), every channel has the same root mean square in both, up to a factor shared by all.

Shape suffixes: C channels of a site.
"""

import torch
from torch import Tensor

from .smooth import LARGEST


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
