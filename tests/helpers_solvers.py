"""Textbook twins of the solvers: slow, float64, one column at a time, nothing blocked, nothing shared with the fast code but the number formats."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from planish.quant.formats import (
    E4M3,
    NVFP4,
    Kind,
    QuantizedWeight,
    ScaleType,
    WeightFormat,
    code_range,
    fitted,
    scale_and_zero,
    to_codes,
    weight_range,
)
from planish.quant.solvers import Clip

Grid = tuple[Tensor, Tensor | None]
FORMATS = [
    WeightFormat(bits=8),
    WeightFormat(bits=4),
    WeightFormat(bits=4, symmetric=False),
    WeightFormat(bits=3, granularity="tensor"),
    WeightFormat(bits=4, symmetric=False, granularity="tensor"),
    WeightFormat(bits=4, granularity="group", group_size=6),
    WeightFormat(bits=4, symmetric=False, granularity="group", group_size=12),
    WeightFormat(bits=8, type="float"),
    WeightFormat(bits=8, type="float", granularity="tensor"),
    WeightFormat(bits=4, type="float", granularity="group", group_size=16),
]
PLAIN = FORMATS[:-1]  # whose scales are numbers by themselves


def format_name(fmt: WeightFormat) -> str:
    return f"{fmt.name}{'s' if fmt.symmetric else 'a'}-{fmt.granularity}{fmt.group_size or ''}"


def all_codes(kind: Kind) -> Tensor:
    """Every code that there is, float32."""
    if kind == E4M3:
        codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
        return codes[~codes.isnan()]
    if kind == NVFP4:
        return torch.tensor([sign * size for sign in (-1, 1) for size in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
    least, most = code_range(kind)
    return torch.arange(least, most + 1).float()


def inputs(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Correlated inputs with a few large channels, (tokens, channels) float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64) / channels**0.5 + 0.5
    x = torch.randn(tokens, channels, generator=generator, dtype=torch.float64) @ mix
    x[:, ::7] *= 5
    return x


def weights(out_channels: int, in_channels: int, seed: int = 1) -> Tensor:
    return torch.randn(out_channels, in_channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.05


def second(x_TI: Tensor) -> Tensor:
    return x_TI.T @ x_TI


def hat(weight: QuantizedWeight) -> Tensor:
    return weight.dequantize().double()


def output_error(w_OI: Tensor, hat_OI: Tensor, H_II: Tensor) -> float:
    """tr((w - w_hat) H (w - w_hat)^T)."""
    gap = w_OI - hat_OI
    return float((gap @ H_II * gap).sum())


def plain_grid(w_OI: Tensor, fmt: WeightFormat, dtype: ScaleType) -> Grid:
    return scale_and_zero(*weight_range(w_OI, fmt), fmt.kind, fmt.symmetric, fitted(w_OI, fmt, dtype))


def one_group(fmt: WeightFormat) -> WeightFormat:
    """The format of a group's weights by themselves, or of what has no groups."""
    whole = fmt.granularity == "tensor" or fmt.kind == NVFP4
    return fmt if whole else replace(fmt, granularity="channel", group_size=None)


def loss(w: Tensor, scale: Tensor, zero: Tensor | None, kind: Kind, power: float) -> float:
    """Sum |w - w_hat|^power of all weights under one scale."""
    codes = to_codes(w, scale, zero, kind)
    return float(((codes - (0 if zero is None else zero)) * scale - w).abs().pow(power).sum())


def clip_losses(w: Tensor, fmt: WeightFormat, clip: Clip, dtype: ScaleType) -> list[float]:
    """The loss of every candidate, for the weights under one scale."""
    losses, i = [], -math.floor(clip.grid / 2 + 1e-9) if fmt.kind == NVFP4 else 0
    while i < clip.shrink * clip.grid - 1e-9:
        factor = 1 - i / clip.grid
        scale, zero = scale_and_zero(w.min() * factor, w.max() * factor, fmt.kind, fmt.symmetric, dtype)
        losses.append(loss(w, scale, zero, fmt.kind, clip.power))
        i += 1
    return losses


def column(w_O: Tensor, grid: Grid, group: int, kind: Kind) -> Tensor:
    """One column rounded to its group's grid."""
    scale, zero = grid[0][:, group], None if grid[1] is None else grid[1][:, group]
    return (to_codes(w_O, scale, zero, kind) - (0 if zero is None else zero)) * scale


def _group_grid(w_OI: Tensor, j: int, fmt: WeightFormat, dtype: ScaleType, grids: Grid | None) -> tuple[Grid, int]:
    if grids is not None:
        return grids, 0 if fmt.group_size is None else j // fmt.group_size
    size = fmt.group_size or w_OI.shape[1]
    return plain_grid(w_OI[:, j // size * size :][:, :size], fmt, dtype), 0


def obq_gptq(w_OI: Tensor, H_II: Tensor, fmt: WeightFormat, damping: float, order: str, dtype: ScaleType) -> Tensor:
    """GPTQ by the explicit inverse of what is free, downdated by each column that is rounded (optimal brain surgeon). Returns w_hat."""
    w_OI, H_II, dtype = w_OI.clone(), H_II.clone(), fitted(w_OI, fmt, dtype)
    size = w_OI.shape[1]
    dead = H_II.diagonal() == 0
    w_OI[:, dead] = 0
    mean = H_II.diagonal()[~dead].mean()
    H_II[dead, dead] = mean
    inverse = torch.linalg.inv(H_II + damping * mean * torch.eye(size, dtype=w_OI.dtype))
    natural = order == "natural"
    sequence = list(range(size)) if natural else H_II.diagonal().where(~dead, 0).argsort(descending=True, stable=True).tolist()
    grids = None if natural and fmt.group_size else plain_grid(w_OI, fmt, dtype)
    hat_OI, free = torch.zeros_like(w_OI), torch.ones(size, dtype=torch.bool)
    for j in sequence:
        if natural and fmt.group_size and j % fmt.group_size == 0:
            grid, group = _group_grid(w_OI, j, fmt, dtype, None)
        elif grids is not None:
            grid, group = _group_grid(w_OI, j, fmt, dtype, grids)
        hat_OI[:, j] = column(w_OI[:, j], grid, group, fmt.kind)
        free[j] = False
        error = (w_OI[:, j] - hat_OI[:, j]) / inverse[j, j]
        w_OI[:, free] -= error[:, None] * inverse[j, free]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return hat_OI


def least_squares_gptaq(w_OI: Tensor, x_TI: Tensor, full_TI: Tensor, fmt: WeightFormat, damping: float, alpha: float, dtype: ScaleType) -> Tensor:
    """GPTAQ by one least-squares problem a column, on the inputs themselves: the free columns stand in for what the column lost. Returns w_hat.

    Damping is written as extra tokens sqrt(damping * mean) * I that both streams share.
    """
    first_OI, w_OI, size, dtype = w_OI, w_OI.clone(), w_OI.shape[1], fitted(w_OI, fmt, dtype)
    extra = (damping * x_TI.square().sum(0).mean()).sqrt() * torch.eye(size, dtype=w_OI.dtype)
    x, gap = torch.cat([x_TI, extra]), torch.cat([full_TI - x_TI, torch.zeros_like(extra)])
    hat_OI = torch.zeros_like(w_OI)
    for j in range(size):
        if j == 0 or (fmt.group_size and j % fmt.group_size == 0):
            grid, group = _group_grid(w_OI, j, fmt, dtype, None)
        hat_OI[:, j] = column(w_OI[:, j], grid, group, fmt.kind)
        if j + 1 < size:
            lost_TO = torch.outer(x[:, j], w_OI[:, j] - hat_OI[:, j]) + alpha * torch.outer(gap[:, j], first_OI[:, j])
            w_OI[:, j + 1 :] += torch.linalg.lstsq(x[:, j + 1 :], lost_TO).solution.T
    return hat_OI


def pulled_gptaq(
    w_OI: Tensor,
    H_II: Tensor,
    D_II: Tensor | None,
    fmt: WeightFormat,
    damping: float,
    alpha: float,
    beta: float,
    order: list[int],
    dtype: ScaleType,
) -> Tensor:
    """GPTQ with a pull and GPTAQ by updates column by column, U of the explicit inverse; the pull is towards w0 and what P has added so far.

    Channels come in `order`; the natural order is the one in which groups fit their grids late: to what columns would round to if none lost anything,
    all that P will add included. Returns w_hat.
    """
    size, natural, dtype = len(H_II), order == sorted(order), fitted(w_OI, fmt, dtype)
    damped_II = (H_II + damping * H_II.diagonal().mean() * torch.eye(size, dtype=H_II.dtype))[order][:, order]
    U_II = torch.linalg.cholesky(torch.linalg.inv(damped_II), upper=True)
    P_II = torch.zeros_like(H_II) if D_II is None else alpha * (D_II[order][:, order] @ U_II.T).triu(1) @ U_II
    first_OI = w_OI[:, order]

    def pulled(w_OI: Tensor, aim_OI: Tensor, j: int) -> Tensor:
        return w_OI[:, j] - beta * (w_OI[:, j] - aim_OI[:, j])

    def step(w_OI: Tensor, j: int, hat_O: Tensor) -> None:
        w_OI[:, j + 1 :] -= torch.outer((w_OI[:, j] - hat_O) / U_II[j, j], U_II[j, j + 1 :])

    grid = None if natural else plain_grid(w_OI, fmt, dtype)
    w_OI, aim_OI, hat_OI = first_OI.clone(), first_OI.clone(), torch.zeros_like(w_OI)
    span = fmt.group_size or size
    for j in range(size):
        if natural and j % span == 0:
            last_OI = first_OI + first_OI @ P_II
            ahead_OI = w_OI + last_OI - aim_OI
            for k in range(j, j + span):
                lossless_O = pulled(ahead_OI, last_OI, k)
                step(ahead_OI, k, lossless_O)
                ahead_OI[:, k] = lossless_O
            grid = plain_grid(ahead_OI[:, j : j + span], one_group(fmt), dtype)
        assert grid is not None
        group = 0 if natural or fmt.group_size is None else order[j] // span
        hat_OI[:, j] = column(pulled(w_OI, aim_OI, j), grid, group, fmt.kind)
        step(w_OI, j, hat_OI[:, j])
        for moved_OI in (w_OI, aim_OI):
            moved_OI[:, j + 1 :] += torch.outer(first_OI[:, j], P_II[j, j + 1 :])
    return hat_OI[:, torch.tensor(order).argsort()]


def obq_heads(w_OI: Tensor, H_II: Tensor, metric_NDD: Tensor, fmt: WeightFormat, damping: float, dtype: ScaleType) -> Tensor:
    """Attention-aware GPTQ by the explicit inverse of a head's whole Hessian G ⊗ H, downdated by each weight that is rounded. Returns w_hat."""
    size, inner, dtype = w_OI.shape[1], metric_NDD.shape[1], fitted(w_OI, fmt, dtype)
    H_II = H_II + damping * H_II.diagonal().mean() * torch.eye(size, dtype=w_OI.dtype)
    span, hats = fmt.group_size or size, []
    for G_DD, head_DI in zip(metric_NDD, w_OI.split(inner), strict=True):
        inverse = torch.linalg.inv(torch.kron(G_DD + damping * G_DD.diagonal().mean() * torch.eye(inner, dtype=w_OI.dtype), H_II))
        w, hat_n = head_DI.flatten().clone(), torch.zeros(inner * size, dtype=w_OI.dtype)
        for n in range(inner * size):
            if n % span == 0:
                grid = plain_grid(w[None, n : n + span], one_group(fmt), dtype)
            hat_n[n] = column(w[n : n + 1], grid, 0, fmt.kind)
            w = w - (w[n] - hat_n[n]) / inverse[n, n] * inverse[n]
            inverse = inverse - torch.outer(inverse[:, n], inverse[n]) / inverse[n, n]
        hats.append(hat_n.view(inner, size))
    return torch.cat(hats)
