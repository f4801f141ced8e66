"""Rotations learned from a sample of a site's inputs alone, without the model: descent over the orthogonal matrices.

Objectives, of tokens y = x R that are scaled to a root mean square of 1, each a mean over tokens:
range: (max - min)^2, with 0 in the range: what the error of an asymmetric grid per token is in proportion to. 4 at best; 12 of uniform values;
kurtosis: |kurtosis - 1.8| of a token's channels; 1.8 is that of uniform values (KurTail, Akhondzadeh et al. 2025, arXiv:2503.01483);
whip: exp(-|y|), which drives values away from 0 and so, as the norm stays, the large ones down (DartQuant, 2025, arXiv:2511.04063).

The descent is the Cayley SGD of SpinQuant (Liu et al. 2024, arXiv:2405.16406; J. Li et al. 2020, arXiv:2002.01113): of the gradient G and the step s
R <- (I + s/2 A)^-1 (I - s/2 A) R with A = G R' - R G'. Here it is done from the right, R <- R (I + s/2 A)^-1 (I - s/2 A) with A = Y' g - g' Y and g
the gradient with respect to Y, which is the same step, as G = X' g. The inverse is a solver's, so R stays orthogonal; and A is scaled, so that
steps are angles, whatever the objective's size.

Shape suffixes: T tokens, C channels.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from ..errors import PlanishError
from .rotation import orthonormal

Objective = Literal["range", "kurtosis", "whip"]
MOMENTUM = 0.9
SHARPNESS = 5.0
"""Of the soft maximum that `range` descends by. 3 to 12 do alike; the true one, with a gradient of 2 channels a token, does a little worse."""
UNIFORM = 1.8
"""The kurtosis of uniform values."""


def learn_rotation(x_TC: Tensor, start_CC: Tensor, objective: Objective, steps: int, lr: float, *, batch: int | None = None, seed: int = 0) -> Tensor:
    """The best rotation met on the way: (C, C) float64, orthogonal, its `objective_of` all tokens never above the start's.

    x_TC: tokens, sinks left out; zero ones do not count. Products with it are in its dtype, float32 at least, all else in float64.
    start_CC: orthogonal, such as a Hadamard matrix. lr: by how many radians the first step turns a channel's axis, on average; it falls to 0 as a
    cosine. 0.05 to 0.1 is usual. batch: tokens of a step, drawn by the seed; None: all of them. Rotations are judged once per pass over the tokens.
    Raises PlanishError: a start that is not orthogonal, inputs that hold NaN or Inf, a batch of no tokens.
    """
    unit_TC, rotation_CC = _unit(x_TC), _orthogonal(start_CC, x_TC)
    best, best_CC = objective_of(unit_TC @ rotation_CC.to(unit_TC.dtype), objective), rotation_CC
    velocity_CC, eye_CC = torch.zeros_like(rotation_CC), torch.eye(len(rotation_CC)).to(rotation_CC)
    for i, (batch_TC, last) in enumerate(_batches(unit_TC, batch, steps, seed)):
        velocity_CC = MOMENTUM * velocity_CC + (1 - MOMENTUM) * _slope(batch_TC @ rotation_CC.to(unit_TC.dtype), _DESCENT[objective])
        half_CC = lr / 4 * (1 + math.cos(math.pi * i / steps)) * velocity_CC
        rotation_CC = rotation_CC @ torch.linalg.solve(eye_CC + half_CC, eye_CC - half_CC)
        if last and (now := objective_of(unit_TC @ rotation_CC.to(unit_TC.dtype), objective)) < best:
            best, best_CC = now, rotation_CC
    return best_CC


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


def _orthogonal(start_CC: Tensor, x_TC: Tensor) -> Tensor:
    """The start to float64's precision, where x is."""
    channels = x_TC.shape[1]
    rotation_CC = start_CC.to(x_TC.device, torch.float64)
    eye_CC = torch.eye(channels).to(rotation_CC)
    if rotation_CC.shape != eye_CC.shape or not bool(((rotation_CC @ rotation_CC.T - eye_CC).abs() < 1e-3).all()):
        raise PlanishError(f"the start of a learned rotation is not an orthogonal matrix of {channels} channels. Start from a Hadamard matrix.")
    return orthonormal(rotation_CC)


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


def _slope(y_TC: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """A = Y' g - g' Y, scaled so that x (I - A) turns an axis by 1 on average: (C, C) float64; 0 where the loss is stationary."""
    y_TC = y_TC.requires_grad_()
    (g_TC,) = torch.autograd.grad(loss(y_TC), y_TC)
    half_CC = (y_TC.detach().T @ g_TC).double()
    A_CC = half_CC - half_CC.T
    size = float(A_CC.norm())
    return A_CC * (math.sqrt(len(A_CC)) / size) if size else A_CC


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
