"""The triangular factor of an inverse Hessian, for Hessians as calibration delivers them: singular, noisy, with dead channels.

(H + damping * mean(diag H) * I)^-1 = U^T U, U upper. With J the flip of all channels and J H J = C C^T, C lower,
U = J C^-1 J: one factorisation and one triangular inverse, where the textbook route (factor, invert, factor again) takes three cubes.
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
    """upper_II: (I, I) U. damping: relative, as used; inf: U is the identity and H was left out. repairs: how often it was raised."""

    upper_II: Tensor
    damping: float
    repairs: int


def inverse_factor(H_II: Tensor, damping: float) -> Factor:
    """U of a symmetric (I, I) Hessian, in its dtype. Dead channels (zero diagonal) count as uncorrelated with the rest.

    Where H is not positive definite, float64 is tried first, then ten times the damping, up to MAX_DAMPING.
    Raises PlanishError where H holds NaN or Inf.
    """
    if not H_II.isfinite().all():
        raise PlanishError("the Hessian of a layer's inputs holds NaN or Inf: an activation overflowed in calibration. Calibrate in float32.")
    dead_I = H_II.diagonal() == 0
    mean = float(H_II.diagonal().abs().sum() / (~dead_I).sum().clamp(min=1))
    if dead_I.any():
        H_II = H_II.clone()
        H_II.diagonal().masked_fill_(dead_I, mean)
    repairs = 0
    for repairs, relative in enumerate(_ladder(damping)):
        for dtype in dict.fromkeys((H_II.dtype, torch.float64)):
            U_II = _factor(H_II.to(dtype), relative * mean)
            if U_II is not None:
                return Factor(U_II.to(H_II.dtype), relative, repairs)
    return Factor(torch.eye(len(H_II), dtype=H_II.dtype, device=H_II.device), math.inf, repairs + 1)


def _ladder(damping: float) -> Iterator[float]:
    """damping, then ten times more each time, up to MAX_DAMPING."""
    yield damping
    damping = max(10 * damping, FIRST_REPAIR)
    while damping <= MAX_DAMPING:
        yield damping
        damping *= 10


def _factor(H_II: Tensor, shift: float) -> Tensor | None:
    """U of H + shift * I, or None if that is not safely positive definite in its dtype."""
    flipped_II = H_II.flip(0, 1)
    flipped_II.diagonal().add_(shift)
    C_II, info = torch.linalg.cholesky_ex(flipped_II)
    if info or not (C_II.diagonal().square() > PIVOT_EPS * torch.finfo(H_II.dtype).eps * flipped_II.diagonal()).all():
        return None
    del flipped_II
    identity_II = torch.eye(len(H_II), dtype=H_II.dtype, device=H_II.device)
    inverse_II: Tensor = torch.linalg.solve_triangular(C_II, identity_II, upper=False)
    del C_II, identity_II
    return inverse_II.flip(0, 1)
