"""Attention-aware rounding of q and k (BoA, Kim et al., "BoA: Attention-aware Post-training Quantization without Backpropagation", ICML 2025).

What matters of q and k are the scores. An error dW (rows of one head, in channels) of q moves them by x dW' K', of k by Q dW x', so the loss is

    tr(G dW H dW'),   H = sum x' x,   G = K' K for q, Q' Q for k,

summed over the query heads that share a k. The Hessian of the head is G ⊗ H, and with G = M' M and H = L' L, both lower, GPTQ's argument (gptq.py)
holds for all weights of the head in the order of rows, then columns: the loss is |M dW L'|², and weight (o, k) rounds

    w_ok + sum d_pj * (M_op / M_oo) * (L_kj / L_kk)   over rows p <= o and columns j <= k, but for itself; d = w - w_hat.

The sum falls in two: row o first takes the whole rows before it, r_o = w_o + sum_{p<o} d_p M_op / M_oo, and r_o is then rounded as GPTQ does any row.
G = I is GPTQ.

This counts all pairs of tokens alike, and holds for attention without positions. RoPE turns q and k by angles that depend
on their tokens, and softmax sees a score's error only as far as its probability p and its distance from the mean; softmax_metrics knows both. To
second order the divergence of a query's probabilities is ds' (diag p - p p') ds / 2, so with keys k~ and queries q~ as RoPE has turned them, by R,

    G of q = sum_i R_i' (sum_j p_ij k~_j k~_j' - m_i m_i') R_i,   m_i = sum_j p_ij k~_j,   G of k = sum_j R_j' (sum_i p_ij (1 - p_ij) q~_i q~_i') R_j.

Exact for the error of one token's q or k alone; that tokens' errors go together, and that G and H are averaged apart, is left out.
Divergence of the probabilities on unseen text in three layers of the demo model: with 4-bit q 0.39, 0.88, 0.87 of GPTQ's, with 4-bit k 0.18, 0.35,
0.37. Of the whole of that model, whose other layers lose more, nothing is to be seen: perplexity 24.55 against 24.54 with 4-bit weights per channel,
and with 4-bit activations too (w4a4-best) 23.26 against 22.81, divergence 0.146 against 0.144.

Shape suffixes: T tokens, Q queries that count, P keys of a prefix, S = P + T keys, N heads, K key heads, G heads of a group, D channels of a head,
O out channels, I in channels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import PlanishError
from ..formats import QuantizedWeight, ScaleType, WeightFormat, fitted
from ..pieces import LAUNCHED
from .cholesky import factor
from .gptq import Gptq, assembled, chosen
from .moments import Moments, Solution, require_moments

TOKENS = 256  # whose products of channels are in memory at a time on a CPU


@torch.no_grad()
def softmax_metrics(
    q_TND: Tensor,
    k_TKD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    scaling: float,
    *,
    before_PKD: Tensor | None = None,
    seen_TS: Tensor | None = None,
    every: int = 1,
) -> tuple[Tensor, Tensor]:
    """G of every query head, (N, D, D), and of every key head, (K, D, D), float64, for one sequence; they add up over sequences.

    q_TND, k_TKD: before RoPE, heads of a group in turn. cos_TD, sin_TD: RoPE's, as transformers has them: of the first channels (none: no RoPE),
    whose halves are turned against each other. scaling: of the scores. before_PKD: keys of a prefix, as RoPE has turned them; they are attended to
    and not rounded. seen_TS: which keys, the prefix's first, a query attends to, None: itself and all before it. every: one query in so many counts:
    as much cheaper, and different by noise alone. Takes T S D² / every operations a head.
    """
    tokens, heads, size = q_TND.shape
    group, past = heads // k_TKD.shape[1], 0 if before_PKD is None else len(before_PKD)
    some_Q = torch.arange(min(every, tokens) - 1, tokens, every, device=q_TND.device)
    seen_TS = torch.ones(tokens, past + tokens, dtype=torch.bool, device=q_TND.device).tril(past) if seen_TS is None else seen_TS
    hidden_QS, cos_QD, sin_QD = ~seen_TS[some_Q], cos_TD[some_Q], sin_TD[some_Q]
    turns_TD = _turns(cos_TD, sin_TD, size)
    query_NDD = torch.zeros(heads, size, size, dtype=torch.float64, device=q_TND.device)
    key_KDD = query_NDD[: k_TKD.shape[1]].clone()
    for head in range(len(key_KDD)):
        mine = slice(head * group, (head + 1) * group)
        q_GQD, k_SD = _turned(q_TND[some_Q, mine].transpose(0, 1), cos_QD, sin_QD), _turned(k_TKD[:, head], cos_TD, sin_TD)
        k_SD = k_SD if before_PKD is None else torch.cat([before_PKD[:, head], k_SD])
        p_GQS = (scaling * q_GQD @ k_SD.T).masked_fill(hidden_QS, -torch.inf).softmax(-1)
        mean_GQD = p_GQS @ k_SD
        spread_GQDD = _outer(p_GQS, k_SD) - mean_GQD[..., None] * mean_GQD[..., None, :]
        query_NDD[mine] = _turned_back(spread_GQDD, cos_QD, sin_QD)
        weights_GQT = (p_GQS * (1 - p_GQS))[..., past:]
        key_KDD[head] = _turned_for_keys(q_GQD, _outer(weights_GQT, turns_TD), cos_TD.shape[-1] // 2)
    return query_NDD, key_KDD


def _outer(weights_GQT: Tensor, x_TD: Tensor) -> Tensor:
    """For every query, the sum of x' x over tokens with its weights: (G, Q, D, D)."""
    (tokens, size), total_GQC = x_TD.shape, weights_GQT.new_zeros(())
    step = TOKENS if x_TD.device.type == "cpu" else max(1, LAUNCHED // size**2)
    for start in range(0, tokens, step):
        some = slice(start, start + step)
        total_GQC = total_GQC + weights_GQT[..., some] @ (x_TD[some, :, None] * x_TD[some, None]).flatten(1)
    return total_GQC.view(*weights_GQT.shape[:-1], size, size)


def _turned(x_TD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """x with its first channels turned as RoPE does; leading dimensions broadcast."""
    turned, rest = x_TD[..., : cos_TD.shape[-1]], x_TD[..., cos_TD.shape[-1] :]
    one, other = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos_TD + torch.cat([-other, one], -1) * sin_TD, rest], -1)


def _turned_back(M_GQDD: Tensor, cos_QD: Tensor, sin_QD: Tensor) -> Tensor:
    """Sum over queries of R' M R, R the turn of the query: (G, D, D) float64."""
    cos_Q1D, back_Q1D = cos_QD[:, None], -sin_QD[:, None]
    half_GQDD = _turned(M_GQDD, cos_Q1D, back_Q1D)
    return _turned(half_GQDD.mT, cos_Q1D, back_Q1D).sum(1, dtype=torch.float64)


def _turns(cos_TD: Tensor, sin_TD: Tensor, size: int) -> Tensor:
    """What a turn is made of, R' q being linear in it: cosines, sines, ones for the channels that are not turned. (T, D)."""
    half = cos_TD.shape[-1] // 2
    return torch.cat([cos_TD[:, :half], sin_TD[:, :half], cos_TD.new_ones(len(cos_TD), size - 2 * half)], 1)


def _turned_for_keys(q_GQD: Tensor, turns_GQDD: Tensor, half: int) -> Tensor:
    """Sum over queries and tokens of w R' q' q R, (D, D) float64. turns_GQDD: for each query the sum over tokens of w t' t, t the token's `_turns`.

    R' q is A t, A made of q: so each query adds A (sum w t' t) A', and no token's turn is made apart.
    """
    one, other, rest = torch.tensor_split(q_GQD[..., None], (half, 2 * half), dim=-2)

    def through(M_GQDD: Tensor) -> Tensor:
        cos, sin, same = torch.tensor_split(M_GQDD, (half, 2 * half), dim=-2)
        return torch.cat([one * cos + other * sin, other * cos - one * sin, rest * same], -2)

    return through(through(turns_GQDD).mT).sum((0, 1), dtype=torch.float64)


@torch.no_grad()
def solve_heads(w_OI: Tensor, fmt: WeightFormat, moments: Moments | None, metric_NDD: Tensor, solver: Gptq, scale_dtype: ScaleType) -> Solution:
    """Quantize w_OI of q or k, (N * D, I), as `solver` does and with errors made up for by later rows of their head as well.

    metric_NDD: G of each head; its scale does not matter, and it is damped as H is. With solver gptaq, rows aim at its target; solver.beta acts
    within rows. Each row's grid fits what the row is when its turn comes. A head whose metric cannot be factored is rounded as without it.
    Raises PlanishError: moments or a metric that are missing, do not fit or are not finite; one scale per tensor, which rows cannot fit in turn.
    """
    moments = require_moments(type(solver).__name__.lower(), moments, w_OI.shape[1])
    _check(w_OI, fmt, metric_NDD)
    heads, size = metric_NDD.shape[:2]
    scale_dtype = fitted(w_OI, fmt, scale_dtype)
    plan = solver.plan(moments, w_OI.dtype, targets=True)
    shares_NDD = torch.stack([_shares(G_DD, chosen(solver.damping)) for G_DD in metric_NDD]).to(w_OI)
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


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Heads among the rows of a weight. rows_ND: which rows each head has, all heads of one size; metric_NDD: G of each."""

    rows_ND: Tensor
    metric_NDD: Tensor


@torch.no_grad()
def solve_among(w_OI: Tensor, fmt: WeightFormat, moments: Moments | None, heads: Heads, solver: Gptq, scale_dtype: ScaleType) -> Solution:
    """Quantize w_OI, the rows of heads as `solve_heads` does and all others as `solver` does."""
    mine_O, scale_dtype = heads.rows_ND.flatten(), fitted(w_OI, fmt, scale_dtype)
    others_O = torch.ones(len(w_OI), dtype=torch.bool, device=w_OI.device).index_fill_(0, mine_O, False).nonzero()[:, 0]
    found = solve_heads(w_OI[mine_O], fmt, moments, heads.metric_NDD, solver, scale_dtype)
    parts = [found.weight] + ([solver.solve(w_OI[others_O], fmt, moments, scale_dtype).weight] if len(others_O) else [])
    order_O = torch.cat([mine_O, others_O]).argsort()
    zeros = [part.zero for part in parts if part.zero is not None]
    zero_OG = torch.cat(zeros)[order_O] if zeros else None
    codes_OI, scale_OG = (torch.cat(tensors)[order_O] for tensors in ([part.codes for part in parts], [part.scale for part in parts]))
    return replace(found, weight=QuantizedWeight(codes_OI, scale_OG, zero_OG, fmt))


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
