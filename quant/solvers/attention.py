"""Attention-aware rounding of q and k (BoA, Kim et al., "BoA: Attention-aware Post-training Quantization without Backpropagation", ICML 2025).

What matters of q and k are the scores. An error dW (rows of one head, in channels) of q moves them by x dW' K', of k by Q dW x', so the loss is

    tr(G dW H dW'),   H = sum x' x,   G = K' K for q, Q' Q for k,

summed over the query heads that share a k. The Hessian of the head is G ⊗ H, and with G = M' M and H = L' L, both lower, GPTQ's argument (gptq.py)
holds for all weights of the head in the order of rows, then columns: the loss is |M dW L'|², and weight (o, k) rounds

    w_ok + sum d_pj * (M_op / M_oo) * (L_kj / L_kk)   over rows p <= o and columns j <= k, but for itself; d = w - w_hat.

The sum falls in two: row o first takes the whole rows before it, r_o = w_o + sum_{p<o} d_p M_op / M_oo, and r_o is then rounded as GPTQ does any row.
G = I is GPTQ.

This counts all pairs of tokens alike (query_metric, key_metric), and holds for attention without positions. RoPE turns q and k by angles that depend
on their tokens, and softmax sees a score's error only as far as its probability p and its distance from the mean; softmax_metrics knows both. To
second order the divergence of a query's probabilities is ds' (diag p - p p') ds / 2, so with keys k~ and queries q~ as RoPE has turned them, by R,

    G of q = sum_i R_i' (sum_j p_ij k~_j k~_j' - m_i m_i') R_i,   m_i = sum_j p_ij k~_j,   G of k = sum_j R_j' (sum_i p_ij (1 - p_ij) q~_i q~_i') R_j.

Exact for the error of one token's q or k alone; that tokens' errors go together, and that G and H are averaged apart, is left out.
Divergence of the probabilities on unseen text in three layers of the demo model: with 4-bit q 0.39, 0.88, 0.87 of GPTQ's, with 4-bit k 0.18, 0.35,
0.37.

Shape suffixes: T tokens, N heads, K key heads, D channels of a head, O = N D out channels, I in channels.
"""

import torch
from torch import Tensor

from ..errors import PlanishError
from ..formats import QuantizedWeight, WeightFormat
from .cholesky import factor
from .gptq import Gptq, assembled
from .moments import Moments, Solution, require_moments


def query_metric(k_TND: Tensor, group: int = 1) -> Tensor:
    """G of every query head: (N * group, D, D) float64. k_TND: keys; `group` query heads in turn read the same one (grouped-query attention)."""
    return _second(k_TND).repeat_interleave(group, dim=0)


def key_metric(q_TND: Tensor, group: int = 1) -> Tensor:
    """G of every key head: (N / group, D, D) float64. q_TND: queries; `group` heads in turn read the same key."""
    if q_TND.shape[1] % group:
        raise PlanishError(f"{q_TND.shape[1]} query heads do not share keys in groups of {group}.")
    metric_NDD = _second(q_TND)
    return metric_NDD.reshape(-1, group, *metric_NDD.shape[1:]).sum(1)


def _second(x_TND: Tensor) -> Tensor:
    x_NTD = x_TND.double().transpose(0, 1)
    return x_NTD.mT @ x_NTD


@torch.no_grad()
def softmax_metrics(q_TND: Tensor, k_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """G of every query head, (N, D, D), and of every key head, (K, D, D), float64, for one sequence of causal attention; they add up over sequences.

    q_TND, k_TKD: before RoPE, heads of a group in turn. cos_TD, sin_TD: RoPE's, as transformers has them: of the first channels, whose halves are
    turned against each other. scaling: of the scores. Takes T² D² operations a head.
    """
    tokens, heads, size = q_TND.shape
    group = heads // k_TKD.shape[1]
    causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=q_TND.device).tril()
    query_NDD = torch.zeros(heads, size, size, dtype=torch.float64, device=q_TND.device)
    key_KDD = torch.zeros(len(query_NDD) // group, size, size, dtype=torch.float64, device=q_TND.device)
    for n in range(heads):
        q_TD, k_TD = _turned(q_TND[:, n], cos_TD, sin_TD), _turned(k_TKD[:, n // group], cos_TD, sin_TD)
        p_TT = (scaling * q_TD @ k_TD.T).masked_fill(~causal_TT, -torch.inf).softmax(1)
        mean_TD = p_TT @ k_TD
        spread_TDD = _outer(p_TT, k_TD) - mean_TD[:, :, None] * mean_TD[:, None]
        query_NDD[n] = _turned_back(spread_TDD, cos_TD, sin_TD)
        key_KDD[n // group] += _turned_back(_outer((p_TT * (1 - p_TT)).T, q_TD), cos_TD, sin_TD)
    return query_NDD, key_KDD


def _outer(weights_TT: Tensor, x_TD: Tensor) -> Tensor:
    """For every token, the sum of x' x over the others with its weights: (T, D, D)."""
    size = x_TD.shape[1]
    return (weights_TT @ (x_TD[:, :, None] * x_TD[:, None]).flatten(1)).view(-1, size, size)


def _turned(x_TD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """x with its first channels turned as RoPE does; leading dimensions broadcast."""
    turned, rest = x_TD[..., : cos_TD.shape[-1]], x_TD[..., cos_TD.shape[-1] :]
    one, other = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos_TD + torch.cat([-other, one], -1) * sin_TD, rest], -1)


def _turned_back(M_TDD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Sum over tokens of R' M R in float64, R the turn of the token: (D, D)."""
    cos_T1D, back_T1D = cos_TD[:, None], -sin_TD[:, None]
    half_TDD = _turned(M_TDD, cos_T1D, back_T1D)
    return _turned(half_TDD.mT, cos_T1D, back_T1D).sum(0, dtype=torch.float64)


@torch.no_grad()
def solve_heads(w_OI: Tensor, fmt: WeightFormat, moments: Moments | None, metric_NDD: Tensor, solver: Gptq, scale_dtype: torch.dtype) -> Solution:
    """Quantize w_OI of q or k, (N * D, I), as `solver` does and with errors made up for by later rows of their head as well.

    metric_NDD: G of each head; its scale does not matter, and it is damped as H is. With solver gptaq, rows aim at its target; solver.beta acts
    within rows. Each row's grid fits what the row is when its turn comes. A head whose metric cannot be factored is rounded as without it.
    Raises PlanishError: moments or a metric that are missing, do not fit or are not finite; one scale per tensor, which rows cannot fit in turn.
    """
    moments = require_moments(type(solver).__name__.lower(), moments, w_OI.shape[1])
    _check(w_OI, fmt, metric_NDD)
    heads, size = metric_NDD.shape[:2]
    plan = solver.plan(moments, w_OI.dtype, targets=True)
    shares_NDD = torch.stack([_shares(G_DD, solver.damping) for G_DD in metric_NDD]).to(w_OI)
    target_NDI = plan.target(plan.alive(w_OI)).reshape(heads, size, -1)
    deviations_NDI = torch.zeros_like(target_NDI)
    parts = []
    for o in range(size):
        row_NI = target_NDI[:, o] + (shares_NDD[:, o, None, :o] @ deviations_NDI[:, :o]).squeeze(1)
        parts.append(solver.round(row_NI, row_NI, fmt, plan, scale_dtype))
        deviations_NDI[:, o] = target_NDI[:, o] - assembled(parts[-1:], fmt).dequantize().to(w_OI.dtype)
    together, by_head_O = assembled(parts, fmt), torch.arange(heads * size, device=w_OI.device).view(size, heads).T.flatten()
    zero_OG = None if together.zero is None else together.zero[by_head_O]
    weight = QuantizedWeight(together.codes[by_head_O], together.scale[by_head_O], zero_OG, fmt)
    return Solution(weight=weight, damping=plan.damping, repairs=plan.repairs)


def _shares(G_DD: Tensor, damping: float) -> Tensor:
    """What row o takes of each deviation before it, M_op / M_oo: (D, D) float64."""
    M_DD = factor(G_DD.double(), damping).lower_II
    return M_DD / M_DD.diagonal()[:, None]


def _check(w_OI: Tensor, fmt: WeightFormat, metric_NDD: Tensor) -> None:
    shape = tuple(metric_NDD.shape)
    if len(shape) != 3 or shape[1] != shape[2] or shape[0] * shape[1] != len(w_OI):
        raise PlanishError(f"metric_NDD has shape {shape}, but for {len(w_OI)} output channels it is (heads, channels of a head, the same again).")
    if not metric_NDD.isfinite().all():
        raise PlanishError("the metric of an attention head holds NaN or Inf: a query or key overflowed in calibration. Calibrate in float32.")
    if fmt.granularity == "tensor":
        raise PlanishError("weights.granularity tensor: one scale cannot fit the rows of a head one after the other. Choose channel or group.")
