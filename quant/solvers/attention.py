"""Attention-aware rounding of q and k (BoA, Kim et al., "BoA: Attention-aware Post-training Quantization without Backpropagation", ICML 2025).

What matters of q and k are the scores. An error dW (rows of one head, in channels) of q moves them by x dW' K', of k by Q dW x', so the loss is

    tr(G dW H dW'),   H = sum x' x,   G = K' K for q, Q' Q for k,

summed over the query heads that share a k. The Hessian of the head is G ⊗ H, and with G = M' M and H = L' L, both lower, GPTQ's argument (gptq.py)
holds for all weights of the head in the order of rows, then columns: the loss is |M dW L'|², and weight (o, k) rounds

    w_ok + sum d_pj * (M_op / M_oo) * (L_kj / L_kk)   over rows p <= o and columns j <= k, but for itself; d = w - w_hat.

The sum falls in two: row o first takes the whole rows before it, r_o = w_o + sum_{p<o} d_p M_op / M_oo, and r_o is then rounded as GPTQ does any row.
G = I is GPTQ.

Exact for attention without positions. RoPE turns q and k by an angle that depends on their distance, so there no single G is right; with q and k as
they are before RoPE it is that of near tokens, with those after it that of a query at position 0. Softmax's own slope is left out, as in the paper.

Shape suffixes: T tokens, N heads, D channels of a head, O = N D out channels, I in channels.
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
    return _second(q_TND).unflatten(0, (-1, group)).sum(1)


def _second(x_TND: Tensor) -> Tensor:
    x_NTD = x_TND.double().transpose(0, 1)
    return x_NTD.mT @ x_NTD


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
    target_NDI = plan.target(plan.alive(w_OI)).unflatten(0, (heads, size))
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
