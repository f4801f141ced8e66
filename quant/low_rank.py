"""Low-rank side paths: what is left in full precision beside a quantized weight, as two thin factors.

y = Q(x) Ŵ' + (x down') up', x the transformed input before it is quantized. LoRC ("ZeroQuant-V2", Yao et al. 2023, arXiv:2303.08302):
the truncated SVD of the weight's error E = W - Ŵ. Weighted (LQER, Zhang et al. 2024, arXiv:2402.02446; QERA, Zhang et al. 2024, arXiv:2410.06040):
the best rank for the error of the outputs, min |(E - up down) X|. SVDQuant (Li et al. 2024, arXiv:2411.05007): the low-rank part goes first, and what
remains is easier to quantize.

All is computed in float64; factors are float32.

Shape suffixes: O out channels, C in channels, R rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PlanishError
from .solvers.cholesky import factor
from .transforms.factors import Chain, on_weight


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A side path beside a linear layer: y += (x down') up'. down_RC: (R, C), up_OR: (O, R)."""

    down_RC: Tensor
    up_OR: Tensor

    def __post_init__(self) -> None:
        if self.down_RC.ndim != 2 or self.up_OR.ndim != 2 or self.down_RC.shape[0] != self.up_OR.shape[1]:
            raise PlanishError(f"A side path of factors {tuple(self.down_RC.shape)} and {tuple(self.up_OR.shape)}, but they are (R, C) and (O, R).")

    def on_input(self, x: Tensor) -> Tensor:
        """What the path adds to the output for x (..., C): (..., O) in x's dtype, computed in the wider of x's and the factors'."""
        dtype = torch.promote_types(x.dtype, self.down_RC.dtype)
        return (x.to(dtype) @ self.down_RC.T.to(dtype) @ self.up_OR.T.to(dtype)).to(x.dtype)

    @property
    def rank(self) -> int:
        """R."""
        return len(self.down_RC)

    def to(self, dtype: torch.dtype) -> "LowRank":
        """Its factors in dtype, laid out as they are when they come from a file: with other strides, products may round otherwise."""
        return LowRank(*(part.to(dtype).contiguous() for part in (self.down_RC, self.up_OR)))

    def plus(self, other: "LowRank | None") -> "LowRank":
        """Both paths in one: their ranks add up."""
        return self if other is None else LowRank(torch.cat([self.down_RC, other.down_RC]), torch.cat([self.up_OR, other.up_OR], dim=1))

    def product(self) -> Tensor:
        """The weight it stands for, up down: (O, C), in float64."""
        return self.up_OR.double() @ self.down_RC.double()

    def through(self, chain: Chain) -> tuple["LowRank", Tensor | None]:
        """The same path on the input as the chain delivers it, and what the layer's bias gains, (O,), if anything."""
        down_RC, offset_R = on_weight(chain, self.down_RC)
        return LowRank(down_RC, self.up_OR), None if offset_R is None else self.up_OR.to(offset_R.dtype) @ offset_R


def lorc(error_OC: Tensor, rank: int) -> LowRank:
    """The best approximation of error_OC, W - Ŵ, in the Frobenius norm: up = U sqrt(S), down = sqrt(S) V' of its SVD."""
    _check_rank(rank, error_OC)
    return LowRank(*(part.float() for part in _halves(error_OC.double(), rank)))


def weighted_lorc(error_OC: Tensor, second_CC: Tensor, rank: int, damping: float = 0.01) -> LowRank:
    """The best approximation of error_OC, W - Ŵ, as the outputs have it: min |(E - up down) X|² over the calibration inputs X.

    second_CC: sum of x' x; its scale does not matter. damping: relative to its mean diagonal, see solvers.cholesky. With X' X = L' L the SVD is
    that of E L', and down = sqrt(S) V' L'^-1. Channels that were always zero are left out.
    """
    _check_rank(rank, error_OC)
    H_CC = second_CC.double()
    dead_C = H_CC.diagonal() == 0
    L_CC = factor(H_CC, damping).lower_II
    down_RC, up_OR = _halves(error_OC.double().masked_fill(dead_C, 0) @ L_CC.T, rank)
    down_RC = torch.linalg.solve_triangular(L_CC.T, down_RC, upper=True, left=False).masked_fill(dead_C, 0)
    return LowRank(down_RC.float(), up_OR.float())


def svdquant(
    w_OC: Tensor, rank: int, quantize: Callable[[Tensor], Tensor], second_CC: Tensor, rounds: int = 100, damping: float = 0.01
) -> tuple[LowRank, Tensor]:
    """Split w_OC in a side path and a residual that quantizes well: y = x (low.product() + Q(residual))'.

    quantize: (O, C) weight to the same as it will run. The first path is of the SVD of W itself; each of `rounds` more is the best one for what the
    quantized residual leaves, W - Q(R), on inputs of second moment second_CC. It stops when the error of the outputs, |(W - low - Q(R)) X|, no longer
    falls. Returns the best path and its residual W - low, float32.
    """
    w_OC = w_OC.double()
    L_CC = factor(second_CC.double(), damping).lower_II
    low, error, least, best = lorc(w_OC, rank), math.inf, math.inf, None
    for _ in range(rounds + 1):
        residual_OC = (w_OC - low.product()).float()
        left_OC = w_OC - quantize(residual_OC).double()
        error = float(((left_OC - low.product()) @ L_CC.T).norm())
        if not error < least:
            break
        least, best = error, (low, residual_OC)
        low = weighted_lorc(left_OC, second_CC, rank, damping)
    if best is None:
        raise PlanishError(f"The weight's error after quantization is {error}: the weight or what quantize returned holds NaN or Inf.")
    return best


def _halves(matrix_OC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """sqrt(S) V' (R, C) and U sqrt(S) (O, R) of the first `rank` singular values.

    By the eigenvectors of the smaller Gram matrix, in float64 to 1e-13 of what the SVD gives, in a quarter of its time (more on CUDA, by reading).
    Of values below about 1e-8 of the largest, which it does not tell from 0, only how the factors share them is noise: their product is small.
    """
    if matrix_OC.shape[0] < matrix_OC.shape[1]:
        down_RO, up_CR = _halves(matrix_OC.T, rank)
        return up_CR.T, down_RO.T
    squares_C, V_CC = torch.linalg.eigh(matrix_OC.T @ matrix_OC)
    root_R, V_CR = squares_C[-rank:].flip(0).clamp(min=0).sqrt().sqrt(), V_CC[:, -rank:].flip(1)
    return root_R[:, None] * V_CR.T, (matrix_OC @ V_CR) * torch.where(root_R > 0, 1 / root_R, 0.0)


def _check_rank(rank: int, matrix_OC: Tensor) -> None:
    if not 1 <= rank <= min(matrix_OC.shape):
        raise PlanishError(f"A side path of rank {rank} for a weight of {tuple(matrix_OC.shape)}, but the rank is 1 to {min(matrix_OC.shape)}.")
