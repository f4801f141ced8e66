"""Where a weight's grid ends: at its largest value, or at the clip that loses least.

Clip search (the weight quantizer of GPTQ, Frantar et al. 2023, and QuaRot, Ashkboos et al. 2024): per scale
c* = argmin_c sum |w - w_hat(c)|^p over c = 1 - i / grid, i < shrink * grid, where c multiplies the range [min, max];
of NVFP4 also over c = 1 + i / grid, up to 1.5.

Shape suffixes: O out channels, I in channels, G groups along I; R scales, K weights under one scale, F candidates, E largest weights.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PlanishError
from ..formats import NVFP4, Kind, ScaleType, WeightFormat, code_range, fitted, nearest, scale_and_zero, weight_range
from ..pieces import pieces

Grid = tuple[Tensor, Tensor | None]

WIDER = 1.5
"""The range whose end is at NVFP4's code 4: its last two codes, 4 and 6, are the furthest apart, and some groups lose less without the last (Cook et
al., "Four Over Six", 2025)."""
EXTREMES = 16
"""One weight in so many, the largest, bounds the loss of a candidate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Settings of the clip search: the candidates 1 - i / grid down to 1 - shrink, and the exponent of the error."""

    grid: int = 100
    shrink: float = 0.8
    power: float = 2.4

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise PlanishError(f"clip.grid is {self.grid}, but it counts the steps from 1 to 0. Choose at least 1, usually 100.")
        if not 0 < self.shrink <= 1:
            raise PlanishError(f"clip.shrink is {self.shrink}, but it is the part of the range to search, above 0 and at most 1.")
        if not 0 < self.power < math.inf:
            raise PlanishError(f"clip.power is {self.power}, but the exponent of the error is positive and finite.")

    def factors(self, kind: Kind = 8) -> list[float]:
        """Candidate shrink factors, falling from 1; then, of NVFP4, those up to WIDER."""
        count = math.ceil(round(self.shrink * self.grid, 9))
        wider = math.floor(round((WIDER - 1) * self.grid, 9)) if kind == NVFP4 else 0
        return [1 - i / self.grid for i in range(count)] + [1 + i / self.grid for i in range(1, wider + 1)]


def fit_grid(w_OI: Tensor, fmt: WeightFormat, clip: Clip | None, scale_dtype: ScaleType) -> Grid:
    """Scale (O, G) and zero point (O, G) or None of a weight; (1, 1) per tensor. Scales are exact in scale_dtype."""
    scale_dtype = fitted(w_OI, fmt, scale_dtype)
    if clip is None:
        return scale_and_zero(*weight_range(w_OI, fmt), fmt.kind, fmt.symmetric, scale_dtype)
    groups = fmt.groups(w_OI.shape[1])
    shape = (1, 1) if fmt.granularity == "tensor" else (w_OI.shape[0], groups)
    w_RK = w_OI.reshape(shape[0] * shape[1], -1)
    chunks = [_search(w_RK[rows], fmt, clip, scale_dtype) for rows in pieces(w_RK)]
    scale = torch.cat([scale_R for scale_R, _ in chunks]).reshape(shape)
    zeros = [zero_R for _, zero_R in chunks if zero_R is not None]
    return scale, torch.cat(zeros).reshape(shape) if zeros else None


def _search(w_RK: Tensor, fmt: WeightFormat, clip: Clip, scale_dtype: ScaleType) -> Grid:
    """Best scale (R) and zero point (R) or None of each row.

    The largest weights alone bound a candidate's loss from below; candidates that cut them too short are passed over.
    """
    from ..kernels import native

    low_R, high_R = w_RK.aminmax(dim=1)
    factors_F1 = torch.tensor(clip.factors(fmt.kind), dtype=w_RK.dtype, device=w_RK.device)[:, None]
    scale_FR, zero_FR = scale_and_zero(low_R * factors_F1, high_R * factors_F1, fmt.kind, fmt.symmetric, scale_dtype)
    if fmt.kind == NVFP4:
        scale_FR = _apart(scale_FR)
    # Relative to the unclipped scale: a tiny scale would underflow when raised to the power.
    unit_FR = (scale_FR / scale_FR[:1]) ** clip.power
    largest_RE = w_RK.gather(1, w_RK.abs().topk(-(-w_RK.shape[1] // EXTREMES), dim=1, sorted=False).indices)
    given = w_RK, largest_RE, scale_FR, zero_FR, unit_FR
    found_R = native.clip_search(*given, code_range(fmt.kind), clip.power) if fmt.type == "int" else None
    best_1R = _least(*given, fmt.kind, clip.power) if found_R is None else found_R[None]
    return scale_FR.gather(0, best_1R)[0], None if zero_FR is None else zero_FR.gather(0, best_1R)[0]


def _least(w_RK: Tensor, largest_RE: Tensor, scale_FR: Tensor, zero_FR: Tensor | None, unit_FR: Tensor, kind: Kind, power: float) -> Tensor:
    """What native.clip_search finds, (1, R), on any device and for any codes: candidate after candidate for all rows at once."""
    bound_FR = unit_FR * _loss(largest_RE, scale_FR, zero_FR, kind, power)
    loss_FR = torch.full_like(scale_FR, math.inf)
    best_R = loss_FR[0]
    for f, scale_R in enumerate(scale_FR):
        if (bound_FR[f] < best_R).any():
            loss_FR[f] = unit_FR[f] * _loss(w_RK, scale_R, None if zero_FR is None else zero_FR[f], kind, power)
            best_R = torch.minimum(best_R, loss_FR[f])
    return loss_FR.argmin(0, keepdim=True)


def _apart(scale_FR: Tensor) -> Tensor:
    """Of neighbours that storing made the same only the first, in as many rows as the richest column has; the others' last ones stand there again."""
    rank_FR = torch.cat([torch.zeros_like(scale_FR[:1], dtype=torch.int64), (scale_FR[1:] != scale_FR[:-1]).cumsum(0)])
    rows = int(rank_FR[-1].max()) + 1
    return scale_FR[-1:].repeat(rows, 1).scatter_(0, rank_FR, scale_FR)


def _loss(w_RK: Tensor, scale_R: Tensor, zero_R: Tensor | None, kind: Kind, power: float) -> Tensor:
    """Sum over K of |w / scale - code|^power, in the shape of scale_R; leading dimensions broadcast."""
    steps_RK = w_RK / scale_R[..., None]
    if zero_R is None:
        codes_RK = nearest(steps_RK.clone(), kind)
    else:
        qmin, qmax = code_range(kind)
        codes_RK = steps_RK.round().clamp_(qmin - zero_R[..., None], qmax - zero_R[..., None])
    # exp(power * log) takes a quarter of the time of pow; log(0) = -inf gives 0.
    return steps_RK.sub_(codes_RK).abs_().log_().mul_(power).exp_().sum(-1)
