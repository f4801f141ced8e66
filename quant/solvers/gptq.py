"""GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023).

Rows w of the weight are independent; each should keep its outputs: min (w - w_hat) H (w - w_hat)^T, H = sum x^T x.
Columns are rounded one after the other, and each error moves the columns that are still free to where they compensate best:

    e_j = w_j - w_hat_j,   w_k <- w_k - e_j * U_jk / U_jj  for k > j,   H^-1 = U^T U, U upper.

The same without an inverse (Chen et al., "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm", 2025): with H = L^T L, L lower,
the loss is |L d|^2 for the deviation d = w - w_hat from the original weight, and what is left to choose in column k when its turn comes is
L_kk d_k + sum_{j<k} L_kj d_j, which is smallest where column k rounds

    w_k + sum_{j<k} d_j * L_kj / L_kk.

So each column collects what all columns before it owe it when its turn comes, blocks are matrix products ("lazy" blocks), and the
weights of a whole group are current when its grid is fitted. Columns are kept as contiguous rows.

FOEM (Zheng et al., "First-Order Error Matters: Accurate Compensation for Quantized Large Language Models", AAAI 2026) pulls columns back towards
the original weights w0, lest they follow the calibration text too far. Here column j is pulled once, by beta, when its turn comes:

    rounded: w_j - beta * (w_j - w0_j),   e_j = w_j - w_hat_j as before,

so that column k collects (1 - beta) d_j L_kj / L_kk: as if its own deviation cost beta / (1 - beta) L_kk^2 more. Where rows aim at something else
than w0 (GPTAQ), that takes its place, in d as well. The paper's formula pulls all free columns at every column: then each debt shrinks by 1 - beta
for every column that it waits, and only about 1 / beta columns are remembered. Error of outputs on unseen text, GPTQ = 1, mean of 9 layers of the
demo model at 4 bits calibrated with 2,555 tokens: 0.98 at beta 0.1, 0.96 at 0.3, by the paper's formula 1.46 at 0.1; with 511: 0.96, 0.89, 1.09.

Shape suffixes: O out channels, I in channels, G groups along I.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from ..errors import PlanishError
from ..formats import Kind, QuantizedWeight, ScaleType, WeightFormat, code_dtype, fitted
from .cholesky import factor
from .clip import Clip, Grid, fit_grid
from .columns import LAUNCHED, Block, launched, round_block
from .moments import Moments, Solution, require_moments

Setting: TypeAlias = float | tuple[float, ...]
"""A number, or several to choose from by text that is held out (search.py)."""

HELD_OUT = 0.25  # of the calibration batches, where settings are chosen by them; they are in nothing else that a solver is told
PIECE = 1 << 21  # weights rounded at a time, whole rows: what is held besides does not grow with the layer
PIECE_LAUNCHED = 1 << 27  # on a GPU, where every column of a piece is a dozen launches, however few its rows


def piece(device: torch.device) -> int:
    """Weights rounded at a time there."""
    return PIECE if device.type == "cpu" else PIECE_LAUNCHED


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How the columns of every row make up for each other; (I, I) matrices in the order of rounding.

    shares_II: what column k takes of each deviation before it, (1 - beta) L_kj / L_kk: lower, its diagonal of no matter. offsets_II: as Gptq._offsets
    says. targets_II: P where rows aim at w + w P from the start, instead of offsets. order_I: None for the natural one. dead_I: channels that were
    always zero, unless all were. damping, repairs: as in Solution.
    """

    shares_II: Tensor
    offsets_II: Tensor | None
    targets_II: Tensor | None
    order_I: Tensor | None
    dead_I: Tensor | None
    damping: float
    repairs: int

    def alive(self, w_OI: Tensor) -> Tensor:
        """Weights with 0 for dead channels."""
        return w_OI if self.dead_I is None else w_OI.masked_fill(self.dead_I, 0)

    def target(self, w_OI: Tensor) -> Tensor:
        """What rows w_OI aim at, (O, I), both in natural order."""
        if self.targets_II is None:
            return w_OI
        if self.order_I is None:
            return w_OI + w_OI @ self.targets_II
        return w_OI + (w_OI[:, self.order_I] @ self.targets_II)[:, self.order_I.argsort()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptq:
    """GPTQ. damping: relative to the mean of H's diagonal. block_size: columns between two matrix products; speed only.

    order: natural, where a group's grid is fitted to the weights as they are when the columns reach it; or diagonal, columns by falling
    diagonal of H on grids fitted beforehand in natural groups, so that consumers need no channel order. beta: pull of every
    column towards its original weights (FOEM); 0: none, 1: rounding to nearest. attention: rows of q and k make up for each other too, as what
    the softmax sees weighs them (attention.py; the block's turn gathers it). Settings that are lists are chosen from, all their combinations, by
    the part held_out of the calibration batches, None: 0.25.
    """

    needs_moments: ClassVar[bool] = True
    needs_cross: ClassVar[bool] = False
    choosable: ClassVar[Mapping[str, str]] = {
        "damping": "a part of the mean diagonal of the Hessian, 0 to 1. Usual: 0.01",
        "beta": "the part of a column's way that is taken back, 0 to 1. Use 0, or 0.1 to 0.3",
    }

    damping: Setting = 0.01
    block_size: int = 128
    order: Literal["natural", "diagonal"] = "natural"
    clip: Clip | None = None
    beta: Setting = 0.0
    held_out: float | None = None
    attention: bool = False

    def __post_init__(self) -> None:
        for name, meaning in self.choosable.items():
            _check_setting(name, getattr(self, name), meaning)
        if self.block_size < 1:
            raise PlanishError(f"solver.block_size is {self.block_size}, but a block has at least 1 column. Usual: 128.")
        if self.order not in ("natural", "diagonal"):
            raise PlanishError(f"solver.order is {self.order!r}. Choose natural or diagonal.")
        if self.held_out is not None and not self.searched:
            raise PlanishError(f"solver.held_out is {self.held_out}, but nothing is to be chosen by it. Make {' or '.join(self.choosable)} a list.")
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise PlanishError(
                f"solver.held_out is {self.held_out}, but it is a part of the calibration batches, above 0 and below 1. Usual: {HELD_OUT}."
            )

    @property
    def searched(self) -> tuple[str, ...]:
        """The settings that are to be chosen."""
        return tuple(name for name in self.choosable if isinstance(getattr(self, name), tuple))

    @property
    def held_share(self) -> float:
        """The part of the calibration batches that is held out: 0 where nothing is to be chosen."""
        return (HELD_OUT if self.held_out is None else self.held_out) if self.searched else 0.0

    def candidates(self) -> list[tuple[dict[str, float], "Gptq"]]:
        """All combinations of the settings to be chosen, each with the solver that has them."""
        found: list[dict[str, Any]] = [
            dict(zip(self.searched, values, strict=True)) for values in product(*(getattr(self, n) for n in self.searched))
        ]
        return [(settings, replace(self, held_out=None, **settings)) for settings in found]

    @torch.no_grad()
    def solve(self, w_OI: Tensor, fmt: WeightFormat, moments: Moments | None, scale_dtype: ScaleType) -> Solution:
        """Quantize w_OI: (out, in), computing in its dtype. Scales are rounded to scale_dtype before codes are chosen.

        Input channels that were always zero get weight 0. Raises PlanishError without moments, or if they hold NaN or Inf, or settings to be chosen.
        """
        moments = require_moments(type(self).__name__.lower(), moments, w_OI.shape[1])
        plan = self.plan(moments, w_OI.dtype)
        scale_dtype = fitted(w_OI, fmt, scale_dtype)
        rows = len(w_OI) if fmt.granularity == "tensor" else max(1, piece(w_OI.device) // w_OI.shape[1])
        pieces = (plan.alive(w_OI[start : start + rows]) for start in range(0, len(w_OI), rows))
        parts = [self.round(piece_OI, plan.target(piece_OI), fmt, plan, scale_dtype) for piece_OI in pieces]
        return Solution(weight=assembled(parts, fmt), damping=plan.damping, repairs=plan.repairs)

    def plan(self, moments: Moments, dtype: torch.dtype, *, targets: bool = False) -> Plan:
        """The plan for layers with these moments, to compute in dtype. targets: no offsets but targets, as anyway where beta is not 0."""
        H_II = moments.second_II.to(dtype)
        dead_I = H_II.diagonal() == 0
        order_I = None if self.order == "natural" else H_II.diagonal().argsort(descending=True, stable=True)
        found = factor(ordered(H_II, order_I), chosen(self.damping) * moments.ordinary)
        offsets_II = self._offsets(found.lower_II, moments, order_I)
        shares_II, targets_II = found.lower_II.div_(found.lower_II.diagonal()[:, None].clone()), None
        beta = chosen(self.beta)
        if offsets_II is not None and (targets or beta):
            targets_II = torch.linalg.solve_triangular(shares_II.T, offsets_II, upper=True, left=False, unitriangular=True)
            offsets_II = None
        if beta:
            shares_II.mul_(1 - beta)
        some_dead = bool(dead_I.any() and not dead_I.all())
        return Plan(shares_II, offsets_II, targets_II, order_I, dead_I if some_dead else None, found.damping, found.repairs)

    def round(self, w_OI: Tensor, target_OI: Tensor, fmt: WeightFormat, plan: Plan, scale_dtype: ScaleType) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes (O, I), scales and zero points of some rows w_OI that aim at target_OI. Grids fitted beforehand fit w_OI."""
        out_channels, in_channels = w_OI.shape
        order_I = plan.order_I
        columns = Columns(target_OI if order_I is None else target_OI[:, order_I], plan.shares_II, plan.offsets_II, code_dtype(fmt.kind))
        if order_I is None:
            scale_OG, zero_OG = self._natural(columns, fmt, scale_dtype)
            return columns.codes_IO.T.contiguous(), scale_OG, zero_OG
        scale_OG, zero_OG = fit_grid(w_OI, fmt, self.clip, scale_dtype)
        steps_IO, zeros_IO = _per_column((scale_OG, zero_OG), in_channels, out_channels)
        columns.round(0, in_channels, (steps_IO[order_I], None if zeros_IO is None else zeros_IO[order_I]), fmt.kind, self.block_size)
        return columns.codes_IO[order_I.argsort()].T.contiguous(), scale_OG, zero_OG

    def _offsets(self, lower_II: Tensor, moments: Moments, order_I: Tensor | None) -> Tensor | None:
        """S (I, I), strictly upper: column k is moved by w_j * S_jk for each column j before it. None: nothing but deviations moves columns."""
        return None

    def _natural(self, columns: "Columns", fmt: WeightFormat, scale_dtype: ScaleType) -> Grid:
        """Round group after group, each on the grid that fits its weights once all earlier columns are paid for."""
        in_channels, out_channels = columns.codes_IO.shape
        span = fmt.group_size or in_channels
        grids = []
        for start in range(0, in_channels, span):
            columns.settle(0, start, start + span)
            grids.append(fit_grid(columns.expected(start, start + span).T, fmt, self.clip, scale_dtype))
            columns.round(start, start + span, _per_column(grids[-1], span, out_channels), fmt.kind, self.block_size)
        zeros = [zero_O1 for _, zero_O1 in grids if zero_O1 is not None]
        return torch.cat([scale_O1 for scale_O1, _ in grids], dim=1), torch.cat(zeros, dim=1) if zeros else None


def _check_setting(name: str, setting: Setting, meaning: str) -> None:
    values = setting if isinstance(setting, tuple) else (setting,)
    if isinstance(setting, tuple) and len(set(setting)) < max(2, len(setting)):
        raise PlanishError(f"solver.{name} is {list(setting)}, but a list to choose from has at least 2 numbers, all different.")
    for value in values:
        if not 0 <= value <= 1:
            raise PlanishError(f"solver.{name} is {value}, but it is {meaning}.")


def chosen(setting: Setting) -> float:
    """The number that a setting is. PlanishError if it is still to be chosen."""
    if isinstance(setting, tuple):
        raise PlanishError(f"{list(setting)} is a list of settings to choose from. Choose one before solving (solvers.search.choose).")
    return setting


def assembled(parts: Sequence[tuple[Tensor, Tensor, Tensor | None]], fmt: WeightFormat) -> QuantizedWeight:
    """The weight whose rows are those of the parts, one after the other."""
    codes_OI, scale_OG = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    zeros = [part[2] for part in parts if part[2] is not None]
    return QuantizedWeight(codes_OI, scale_OG.float(), torch.cat(zeros).float() if zeros else None, fmt)


def ordered(matrix_II: Tensor, order_I: Tensor | None) -> Tensor:
    """Rows and columns in this order; None: as they are."""
    return matrix_II if order_I is None else matrix_II.index_select(0, order_I).index_select(1, order_I)


class Columns:
    """The columns of a weight on their way to codes.

    original_IO: (I, O). weights_IO: (I, O). What is left to round, current up to what was settled. deviations_IO: (I, O). original - rounded.
    shares_II: (I, I). What column k takes of each deviation before it: L_kj / L_kk. offsets_II: as Gptq._offsets says.
    codes_IO: (I, O), filled as columns are rounded.
    """

    def __init__(self, w_OI: Tensor, shares_II: Tensor, offsets_II: Tensor | None, codes: torch.dtype) -> None:
        """w_OI: (out, in), shares_II and offsets_II: (in, in), all in the order of rounding."""
        self.original_IO = w_OI.T.contiguous()
        self.weights_IO, self.deviations_IO = self.original_IO.clone(), torch.zeros_like(self.original_IO)
        self.shares_II, self.offsets_II = shares_II, offsets_II
        self.codes_IO = torch.empty(self.weights_IO.shape, dtype=codes, device=w_OI.device)

    def settle(self, first: int, start: int, stop: int) -> None:
        """Columns start:stop take what columns first:start owe them."""
        self.weights_IO[start:stop].addmm_(self.shares_II[start:stop, first:start], self.deviations_IO[first:start])
        self._offset(first, start, slice(start, stop))

    def _offset(self, first: int, last: int, columns: slice) -> None:
        if self.offsets_II is not None:
            self.weights_IO[columns].addmm_(self.offsets_II[first:last, columns].T, self.original_IO[first:last])

    def expected(self, start: int, stop: int) -> Tensor:
        """What columns start:stop would round if none of them deviated from it: (stop - start, O). All before start is settled."""
        if not start:
            return self.original_IO[:stop]  # nothing has moved them yet
        moved_IO = self.weights_IO[start:stop] - self.original_IO[start:stop]
        solved_IO: Tensor = torch.linalg.solve_triangular(self.shares_II[start:stop, start:stop], moved_IO, upper=False, unitriangular=True)
        return self.original_IO[start:stop] + solved_IO

    def round(self, start: int, stop: int, grid: Grid, kind: Kind, block_size: int) -> None:
        """Round columns start:stop, to which nothing before start owes any more. grid: scales and zero points, (stop - start, O)."""
        scale_IO, zero_IO = grid
        size = min(block_size, LAUNCHED) if launched(self.weights_IO) else block_size
        for first in range(start, stop, size):
            last = min(first + size, stop)
            self.settle(start, first, last)
            self._offset(first, last, slice(first, last))
            columns, here = slice(first, last), slice(first - start, last - start)
            block = Block(
                weights_KO=self.weights_IO[columns],
                original_KO=self.original_IO[columns],
                deviations_KO=self.deviations_IO[columns],
                codes_KO=self.codes_IO[columns],
                shares_KK=self.shares_II[columns, columns],
                scale_KO=scale_IO[here],
                zero_KO=None if zero_IO is None else zero_IO[here],
            )
            round_block(block, kind)


def _per_column(grid: Grid, in_channels: int, out_channels: int) -> Grid:
    """Scales and zero points (O, G) or (1, 1) as (I, O), a view where one grid serves all columns."""
    scale_IO, zero_IO = (
        None if part is None else part.T[:, None].expand(-1, in_channels // part.shape[1], out_channels).reshape(in_channels, out_channels)
        for part in grid
    )
    assert scale_IO is not None
    return scale_IO, zero_IO
