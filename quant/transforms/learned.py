"""Rotations learned from a sample of a site's inputs alone, without the model: descent over the orthogonal matrices.

Objectives, of tokens y = x R that are scaled to a root mean square of 1, each a mean over tokens:
range: (max - min)^2, with 0 in the range: what the error of an asymmetric grid per token is in proportion to. 4 at best; 12 of uniform values;
kurtosis: |kurtosis - 1.8| of a token's channels; 1.8 is that of uniform values (KurTail, Akhondzadeh et al. 2025, arXiv:2503.01483);
whip: exp(-|y|), which drives values away from 0 and so, as the norm stays, the large ones down (DartQuant, 2025, arXiv:2511.04063).

The descent is the Cayley SGD of SpinQuant (Liu et al. 2024, arXiv:2405.16406; J. Li et al. 2020, arXiv:2002.01113): of the gradient G and the step s
R <- (I + s/2 A)^-1 (I - s/2 A) R with A = G R' - R G'. Here it is done from the right, R <- R (I + s/2 A)^-1 (I - s/2 A) with A = Y' g - g' Y and g
the gradient with respect to Y, which is the same step, as G = X' g. The inverse is a solver's, so R stays orthogonal; and A is scaled, so that
steps are angles, whatever the objective's size.

Shape suffixes: T tokens, C channels: K parts of Q groups of E channels each, the groups of a part turned alike; N = T Q.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from ..errors import PlanishError
from .factors import Blocks
from .rotation import orthonormal

Objective = Literal["range", "kurtosis", "whip"]
MOMENTUM = 0.9
SHARPNESS = 5.0
"""Of the soft maximum that `range` descends by. 3 to 12 do alike; the true one, with a gradient of 2 channels a token, does a little worse."""
UNIFORM = 1.8
"""The kurtosis of uniform values."""


def learn_rotations(
    x_TC: Tensor, start_KEE: Tensor, objective: Objective, steps: int, lr: float, *, batch: int | None = None, seed: int = 0
) -> Tensor:
    """The best rotations met on the way: (K, E, E) float64, orthogonal, the `objective_of` all tokens never above the start's.

    x_TC: tokens; zero ones do not count. C = K Q E: each of K parts holds Q groups of E channels, which share the part's rotation, as the query heads
    of a key-value head do; a token's objective is that of all its channels. Products with it are in its dtype, float32 at least, all else in float64.
    start_KEE: orthogonal, such as Hadamard matrices. lr: by how many radians the first step turns a channel's axis, on average; it falls to 0 as a
    cosine. 0.05 to 0.1 is usual. batch: tokens of a step, drawn by the seed; None: all of them. Rotations are judged once per pass over the tokens.
    Raises PlanishError: a start that is not orthogonal or not of that many channels, inputs that hold NaN or Inf, a batch of no tokens.
    """
    unit_TC, rotation_KEE = _unit(x_TC), _orthogonal(start_KEE, x_TC)
    best, best_KEE = objective_of(turned(unit_TC, rotation_KEE), objective), rotation_KEE
    velocity_KEE, eye_EE = torch.zeros_like(rotation_KEE), torch.eye(rotation_KEE.shape[1]).to(rotation_KEE)
    for i, (batch_TC, last) in enumerate(_batches(unit_TC, batch, steps, seed)):
        slope_KEE = _slope(turned(batch_TC, rotation_KEE), len(rotation_KEE), len(eye_EE), _DESCENT[objective])
        velocity_KEE = MOMENTUM * velocity_KEE + (1 - MOMENTUM) * slope_KEE
        half_KEE = lr / 4 * (1 + math.cos(math.pi * i / steps)) * velocity_KEE
        rotation_KEE = rotation_KEE @ torch.linalg.solve(eye_EE + half_KEE, eye_EE - half_KEE)
        if last and (now := objective_of(turned(unit_TC, rotation_KEE), objective)) < best:
            best, best_KEE = now, rotation_KEE
    return best_KEE


def turned(x_TC: Tensor, rotation_KEE: Tensor) -> Tensor:
    """The tokens, every group of E channels turned by its part's rotation: (T, C) in x's dtype."""
    groups = x_TC.shape[1] // (rotation_KEE.shape[0] * rotation_KEE.shape[1])
    return Blocks(rotation_KEE.repeat_interleave(groups, 0).to(x_TC.dtype)).on_input(x_TC)


def objective_of(y_TC: Tensor, objective: Objective) -> float:
    """The objective of tokens y_TC, whatever their sizes; zero ones do not count, and of none it is 0."""
    unit_TC = _unit(y_TC)
    return float(_TRUE[objective](unit_TC)) if len(unit_TC) else 0.0


def _unit(x_TC: Tensor) -> Tensor:
    """Tokens with a root mean square of 1, those that are zero left out."""
    if not x_TC.isfinite().all():
        raise PlanishError("the inputs to learn a rotation from hold NaN or Inf: an activation overflowed in calibration. Calibrate in float32.")
    peak_T1 = x_TC.abs().amax(1, keepdim=True)
    x_TC = (x_TC.to(torch.promote_types(x_TC.dtype, torch.float32)) / peak_T1)[peak_T1[:, 0] > 0]
    return x_TC / x_TC.square().mean(1, keepdim=True).sqrt()


def _orthogonal(start_KEE: Tensor, x_TC: Tensor) -> Tensor:
    """The start to float64's precision, where x is."""
    channels = x_TC.shape[1]
    rotation_KEE = start_KEE.to(x_TC.device, torch.float64)
    parts, size = rotation_KEE.shape[:2]
    eye_EE = torch.eye(size).to(rotation_KEE)
    fits = rotation_KEE.shape == (parts, size, size) and not channels % (parts * size)
    if not fits or not bool(((rotation_KEE @ rotation_KEE.mT - eye_EE).abs() < 1e-3).all()):
        what = f"an orthogonal matrix of {channels} channels" if parts == 1 else f"{parts} orthogonal matrices that divide {channels} channels"
        raise PlanishError(f"the start of a learned rotation is not {what}. Start from a Hadamard matrix.")
    return torch.stack([orthonormal(part_EE) for part_EE in rotation_KEE])


def _batches(unit_TC: Tensor, batch: int | None, steps: int, seed: int) -> Iterator[tuple[Tensor, bool]]:
    """Tokens for each step, and whether a pass over all ends with it, or the descent."""
    if batch is not None and batch < 1:
        raise PlanishError(f"a rotation cannot be learned from {batch} tokens a step. Use some hundreds, or leave it out for all.")
    size = len(unit_TC) if batch is None else min(batch, len(unit_TC))
    if size == 0:
        return
    generator, a_pass = torch.Generator().manual_seed(seed), len(unit_TC) // size
    for first in range(0, steps, a_pass):
        order_T = torch.randperm(len(unit_TC), generator=generator).to(unit_TC.device)
        for i in range(first, min(first + a_pass, steps)):
            tokens_T = order_T[(i - first) * size :][:size]
            yield unit_TC if size == len(unit_TC) else unit_TC[tokens_T], i + 1 in (first + a_pass, steps)


def _slope(y_TC: Tensor, parts: int, size: int, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """A = Y' g - g' Y of each part, all scaled so that x (I - A) turns an axis by 1 on average: (K, E, E) float64; 0 where the loss is stationary."""
    y_TC = y_TC.requires_grad_()
    (g_TC,) = torch.autograd.grad(loss(y_TC), y_TC)
    y_KNE, g_KNE = (values.reshape(len(values), parts, -1, size).transpose(0, 1).reshape(parts, -1, size) for values in (y_TC.detach(), g_TC))
    half_KEE = (y_KNE.mT @ g_KNE).double()
    A_KEE = half_KEE - half_KEE.mT
    norm = float(A_KEE.norm())
    return A_KEE * (math.sqrt(parts * size) / norm) if norm else A_KEE


def _range(y_TC: Tensor) -> Tensor:
    return (y_TC.amax(1).clamp(min=0) - y_TC.amin(1).clamp(max=0)).square().mean()


def _soft_range(y_TC: Tensor) -> Tensor:
    return ((torch.logsumexp(SHARPNESS * y_TC, 1) + torch.logsumexp(-SHARPNESS * y_TC, 1)) / SHARPNESS).square().mean()


def _kurtosis(y_TC: Tensor) -> Tensor:
    centred_TC = y_TC - y_TC.mean(1, keepdim=True)
    variance_T = centred_TC.square().mean(1).clamp(min=torch.finfo(y_TC.dtype).eps)
    return (centred_TC.pow(4).mean(1) / variance_T.square() - UNIFORM).abs().mean()


def _whip(y_TC: Tensor) -> Tensor:
    return (-y_TC.abs()).exp().mean()


_TRUE: dict[Objective, Callable[[Tensor], Tensor]] = {"range": _range, "kurtosis": _kurtosis, "whip": _whip}
_DESCENT: dict[Objective, Callable[[Tensor], Tensor]] = {**_TRUE, "range": _soft_range}
