"""The triangular factor of a Hessian, for Hessians as calibration delivers them: singular, noisy, with dead channels.

H + damping * mean(diag H) * I = L^T L, L lower: column k of a weight meets in row k of L all columns before it. With J the flip of all channels and
J H J = R^T R, R upper as factorisations have it, L = J R J.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PlanishError

MAX_DAMPING = 10.0
"""Relative damping beyond which a Hessian has nothing left to say."""
FIRST_REPAIR = 1e-4
"""Relative damping that a repair starts from where none was asked for."""
PIVOT_EPS = 32
"""A pivot below this many rounding errors of its diagonal entry is noise."""


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """lower_II: (I, I) L. damping: relative, as used; inf: L is the identity and H was left out. repairs: how often it was raised."""

    lower_II: Tensor
    damping: float
    repairs: int


def factor(H_II: Tensor, damping: float) -> Factor:
    """L of a symmetric (I, I) Hessian, in its dtype. Dead channels (zero diagonal) count as uncorrelated with the rest.

    Where H is not positive definite, float64 is tried first, then ten times the damping, up to MAX_DAMPING.
    Raises PlanishError where H holds NaN or Inf.
    """
    if not H_II.isfinite().all():
        raise PlanishError("the Hessian of a layer's inputs holds NaN or Inf: an activation overflowed in calibration. Calibrate in float32.")
    dead_I = H_II.diagonal() == 0
    mean = float(H_II.diagonal().abs().sum() / (~dead_I).sum().clamp(min=1))
    repairs = 0
    for repairs, relative in enumerate(_ladder(damping)):
        for dtype in dict.fromkeys((H_II.dtype, torch.float64)):
            flipped_II = H_II.flip(0, 1).to(dtype)
            flipped_II.diagonal().add_(relative * mean + mean * dead_I.flip(0).to(dtype))
            R_II, info = torch.linalg.cholesky_ex(flipped_II, upper=True)
            noise_I = PIVOT_EPS * torch.finfo(dtype).eps * flipped_II.diagonal()
            del flipped_II
            if not info and (R_II.diagonal().square() > noise_I).all():
                return Factor(R_II.flip(0, 1).to(H_II.dtype), relative, repairs)
    return Factor(torch.eye(len(H_II), dtype=H_II.dtype, device=H_II.device), math.inf, repairs + 1)


def _ladder(damping: float) -> Iterator[float]:
    """damping, then ten times more each time, up to MAX_DAMPING."""
    yield damping
    damping = max(10 * damping, FIRST_REPAIR)
    while damping <= MAX_DAMPING:
        yield damping
        damping *= 10
