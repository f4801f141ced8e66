"""GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023).

Rows w of the weight are independent; each should keep its outputs: min (w - w_hat) H (w - w_hat)^T, H = sum x^T x.
Columns are rounded one after the other, and each error moves the columns that are still free to where they compensate best:

    e_j = w_j - w_hat_j,   w_k <- w_k - e_j * U_jk / U_jj  for k > j,   H^-1 = U^T U, U upper.

Written left-looking: column k collects what all columns before it owe it when its turn comes, so that blocks are matrix products
("lazy" blocks), and the weights of a whole group are current when its grid is fitted. Columns are kept as contiguous rows.

Shape suffixes: O out channels, I in channels, G groups along I; E debts that a column leaves to later ones (1: its error).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import PlanishError
from ..formats import QuantizedWeight, WeightFormat, code_range
from .cholesky import inverse_factor
from .clip import Clip, Grid, fit_grid
from .moments import Moments, Solution, require_moments


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptq:
    """GPTQ. damping: relative to the mean of H's diagonal. block_size: columns between two matrix products; speed only.

    order: natural, where a group's grid is fitted to the weights as they are when the columns reach it; or diagonal, columns by falling
    diagonal of H on grids fitted beforehand in natural groups, so that consumers need no channel order.
    """

    needs_moments: ClassVar[bool] = True
    needs_cross: ClassVar[bool] = False

    damping: float = 0.01
    block_size: int = 128
    order: Literal["natural", "diagonal"] = "natural"
    clip: Clip | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise PlanishError(f"solver.damping is {self.damping}, but it is a part of the mean diagonal of the Hessian, 0 to 1. Usual: 0.01.")
        if self.block_size < 1:
            raise PlanishError(f"solver.block_size is {self.block_size}, but a block has at least 1 column. Usual: 128.")
        if self.order not in ("natural", "diagonal"):
            raise PlanishError(f"solver.order is {self.order!r}. Choose natural or diagonal.")

    @torch.no_grad()
    def solve(self, w_OI: Tensor, fmt: WeightFormat, moments: Moments | None, scale_dtype: torch.dtype) -> Solution:
        """Quantize w_OI: (out, in), computing in its dtype. Scales are rounded to scale_dtype before codes are chosen.

        Input channels that were always zero get weight 0. Raises PlanishError without moments, or if they hold NaN or Inf.
        """
        out_channels, in_channels = w_OI.shape
        moments = require_moments(type(self).__name__.lower(), moments, in_channels)
        H_II = moments.second_II.to(w_OI.dtype)
        dead_I = H_II.diagonal() == 0
        if not dead_I.all():
            w_OI = w_OI.masked_fill(dead_I, 0)
        order_I = self._order(H_II)
        if self.order != "natural":
            H_II = H_II[order_I[:, None], order_I]
        factor = inverse_factor(H_II, self.damping * moments.ordinary)
        damping, repairs, shares_IIE = factor.damping, factor.repairs, self._shares(factor.upper_II, moments, order_I)
        del H_II, factor
        columns = Columns(w_OI if self.order == "natural" else w_OI[:, order_I], shares_IIE)
        del shares_IIE
        if self.order == "diagonal":
            scale_OG, zero_OG = fit_grid(w_OI, fmt, self.clip, scale_dtype)
            steps_IO, zeros_IO = _per_column((scale_OG, zero_OG), in_channels, out_channels)
            columns.round(0, in_channels, (steps_IO[order_I], None if zeros_IO is None else zeros_IO[order_I]), fmt.bits, self.block_size)
        else:
            scale_OG, zero_OG = self._natural(columns, fmt, scale_dtype)
        codes_OI = columns.codes_IO[order_I.argsort()].T.contiguous()
        weight = QuantizedWeight(codes_OI, scale_OG.float(), None if zero_OG is None else zero_OG.float(), fmt)
        return Solution(weight=weight, damping=damping, repairs=repairs)

    def _order(self, H_II: Tensor) -> Tensor:
        """The channels, as they are rounded."""
        if self.order == "natural":
            return torch.arange(len(H_II), device=H_II.device)
        return H_II.diagonal().argsort(descending=True, stable=True)

    def _shares(self, U_II: Tensor, moments: Moments, order_I: Tensor) -> Tensor:
        """What each column takes from each debt of an earlier column: (I, I, E). In GPTQ the debt is the column's error."""
        return (U_II / U_II.diagonal()[:, None]).T[:, :, None]

    def _natural(self, columns: "Columns", fmt: WeightFormat, scale_dtype: torch.dtype) -> Grid:
        """Round group after group, each on the grid that fits its weights once all earlier columns are paid for."""
        in_channels, out_channels = columns.codes_IO.shape
        span = fmt.group_size or in_channels
        grids = []
        for start in range(0, in_channels, span):
            columns.settle(0, start, start + span)
            grids.append(fit_grid(columns.weights_IO[start : start + span].T, fmt, self.clip, scale_dtype))
            columns.round(start, start + span, _per_column(grids[-1], span, out_channels), fmt.bits, self.block_size)
        zeros = [zero_O1 for _, zero_O1 in grids if zero_O1 is not None]
        return torch.cat([scale_O1 for scale_O1, _ in grids], dim=1), torch.cat(zeros, dim=1) if zeros else None


class Columns:
    """The columns of a weight on their way to codes.

    debts_IEO: (I, E, O). What rounded columns leave to later ones: [:, 0] the error, [:, 1] the weight it had at first.
    weights_IO: (I, O). What is left to round, in the place where the error will be.
    shares_IK: (I, I * E). What column i takes from each debt of the columns before it.
    codes_IO: (I, O) int8, filled as columns are rounded.
    """

    def __init__(self, w_OI: Tensor, shares_IIE: Tensor) -> None:
        """w_OI: (out, in) and shares_IIE: (in, in, E), both in the order of rounding."""
        out_channels, in_channels = w_OI.shape
        self.shares_IK = shares_IIE.flatten(1).contiguous()
        self.debts_IEO = w_OI.T[:, None].repeat(1, shares_IIE.shape[2], 1)
        self.weights_IO = self.debts_IEO[:, 0]
        self.codes_IO = torch.empty(in_channels, out_channels, dtype=torch.int8, device=w_OI.device)

    def settle(self, first: int, start: int, stop: int) -> None:
        """Columns start:stop take what columns first:start owe them."""
        kinds = self.debts_IEO.shape[1]
        shares_IK = self.shares_IK[start:stop, kinds * first : kinds * start]
        self.weights_IO[start:stop].addmm_(shares_IK, self.debts_IEO[first:start].flatten(0, 1), alpha=-1)

    def round(self, start: int, stop: int, grid: Grid, bits: int, block_size: int) -> None:
        """Round columns start:stop, to which nothing before start owes any more. grid: scales and zero points, (stop - start, O)."""
        scale_IO, zero_IO = _quick(grid[0]), None if grid[1] is None else _quick(grid[1])
        for first in range(start, stop, block_size):
            last = min(first + block_size, stop)
            self.settle(start, first, last)
            self._round_block(first, last, scale_IO[first - start :], None if zero_IO is None else zero_IO[first - start :], bits)

    def _round_block(self, first: int, last: int, scale_IO: Any, zero_IO: Any, bits: int) -> None:
        """Columns first:last, one after the other: each takes what those since first owe it, then is rounded as formats.to_codes does."""
        kinds = self.debts_IEO.shape[1]
        weights_IO, debts_IEO, codes_IO = _quick(self.weights_IO), _quick(self.debts_IEO), _quick(self.codes_IO)
        debts_KO, shares_IK = debts_IEO.reshape(-1, debts_IEO.shape[2]), _quick(self.shares_IK)
        lowest, highest = code_range(bits)
        for j in range(first, last):
            w_O, scale_O = weights_IO[j], scale_IO[j - first]
            w_O -= shares_IK[j, kinds * first : kinds * j] @ debts_KO[kinds * first : kinds * j]
            zero_O = 0 if zero_IO is None else zero_IO[j - first]
            codes_O = (w_O / scale_O + zero_O).round().clip(lowest, highest)
            codes_IO[j] = codes_O
            debts_IEO[j, 0] = w_O - (codes_O - zero_O) * scale_O


def _quick(tensor: Tensor) -> Any:
    """The same memory as a numpy array, whose calls on one column cost a third of torch's; the tensor itself where it is not on the CPU."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _per_column(grid: Grid, in_channels: int, out_channels: int) -> Grid:
    """Scales and zero points (O, G) or (1, 1) as (I, O), a view where one grid serves all columns."""
    scale_IO, zero_IO = (
        None if part is None else part.T[:, None].expand(-1, in_channels // part.shape[1], out_channels).reshape(in_channels, out_channels)
        for part in grid
    )
    assert scale_IO is not None
    return scale_IO, zero_IO
