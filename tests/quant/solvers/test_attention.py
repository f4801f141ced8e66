"""Attention-aware rounding against the explicit inverse of the whole Hessian of a head, and its loss against GPTQ's."""

import math
from typing import Any

import pytest
import torch
from helpers_solvers import format_name, hat, inputs, obq_heads, second, weights
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.formats import WeightFormat
from planish.quant.solvers import Gptaq, Gptq, Moments
from planish.quant.solvers.attention import Heads, softmax_metrics, solve_among, solve_heads

INT4 = WeightFormat(bits=4)
FORMATS = [
    INT4,
    WeightFormat(bits=3, symmetric=False),
    WeightFormat(bits=4, granularity="group", group_size=6),
    WeightFormat(bits=4, symmetric=False, granularity="group", group_size=4),
]


def moments(x_TI: Tensor) -> Moments:
    return Moments(second_II=second(x_TI), tokens=len(x_TI))


def query_metric(k_TND: Tensor, group: int = 1) -> Tensor:
    """G = K' K of every query head; `group` of them in turn read the same key."""
    return torch.einsum("tnd,tne->nde", k_TND, k_TND).repeat_interleave(group, dim=0)


def key_metric(q_TND: Tensor, group: int) -> Tensor:
    """G = sum Q' Q of every key head, over the query heads that read it."""
    return query_metric(q_TND).unflatten(0, (-1, group)).sum(1)


def heads(count: int, size: int, tokens: int = 60) -> Tensor:
    """Metrics of heads whose keys are correlated: (count, size, size)."""
    return query_metric(torch.stack([inputs(tokens, size, seed) for seed in range(count)], dim=1))


def score_error(w_OI: Tensor, hat_OI: Tensor, H_II: Tensor, metric_NDD: Tensor) -> float:
    """Sum over heads of tr(G dW H dW')."""
    d_NDI = (w_OI - hat_OI).unflatten(0, metric_NDD.shape[:2])
    return float((metric_NDD @ d_NDI @ H_II * d_NDI).sum())


@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
@pytest.mark.parametrize(("block_size", "damping"), [(5, 0.01), (128, 0.1)])
def test_equals_the_explicit_inverse_of_the_whole_hessian(fmt: WeightFormat, block_size: int, damping: float) -> None:
    w_OI, told, metric_NDD = weights(10, 12), moments(inputs(80, 12)), heads(2, 5)
    fast = solve_heads(w_OI, fmt, told, metric_NDD, Gptq(block_size=block_size, damping=damping), torch.float32)
    torch.testing.assert_close(hat(fast.weight), obq_heads(w_OI, told.second_II, metric_NDD, fmt, damping, torch.float32), rtol=1e-6, atol=1e-9)
    assert (fast.damping, fast.repairs) == (damping, 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
@pytest.mark.parametrize("order", ["natural", "diagonal"])
def test_the_error_of_the_scores_is_below_plain_gptq(seed: int, fmt: WeightFormat, order: Any) -> None:
    w_OI, told, metric_NDD = weights(36, 24, seed), moments(inputs(200, 24, seed)), heads(3, 12)
    solver = Gptq(order=order)
    aware, plain = (
        score_error(w_OI, hat(solution.weight), told.second_II, metric_NDD)
        for solution in (solve_heads(w_OI, fmt, told, metric_NDD, solver, torch.float32), solver.solve(w_OI, fmt, told, torch.float32))
    )
    assert aware < 0.7 * plain


def test_scores_themselves() -> None:
    """The loss is that of the scores: with and without shared keys, seen from either side."""
    x_TI, w_OI, other_TI = inputs(50, 8), weights(12, 8), inputs(50, 8, 4)
    queries_TND, keys_TND = (x_TI @ w_OI.T).unflatten(1, (4, 3)), (other_TI @ weights(6, 8, 2).T).unflatten(1, (2, 3))
    d_OI = weights(12, 8, 3)
    moved_TND = (x_TI @ d_OI.T).unflatten(1, (4, 3))
    scores = sum(float((moved_TND[:, n] @ keys_TND[:, n // 2].T).square().sum()) for n in range(4))
    assert score_error(d_OI, torch.zeros_like(d_OI), second(x_TI), query_metric(keys_TND, 2)) == pytest.approx(scores)
    d_OI = weights(6, 8, 3)
    moved_TND = (other_TI @ d_OI.T).unflatten(1, (2, 3))
    scores = sum(float((queries_TND[:, n] @ moved_TND[:, n // 2].T).square().sum()) for n in range(4))
    assert score_error(d_OI, torch.zeros_like(d_OI), second(other_TI), key_metric(queries_TND, 2)) == pytest.approx(scores)


def rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Channel by channel: pair c of the first cos.shape[1] channels turns by its angle."""
    y, half = x_TND.clone(), cos_TD.shape[1] // 2
    for c in range(half):
        one, other = x_TND[..., c], x_TND[..., c + half]
        y[..., c] = one * cos_TD[:, c, None] - other * sin_TD[:, c, None]
        y[..., c + half] = other * cos_TD[:, c, None] + one * sin_TD[:, c, None]
    return y


def attention(q_TND: Tensor, k_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor, scaling: float) -> Tensor:
    """Logarithms of the probabilities: (N, T, T)."""
    group = q_TND.shape[1] // k_TKD.shape[1]
    q, k = rope(q_TND, cos_TD, sin_TD), rope(k_TKD, cos_TD, sin_TD).repeat_interleave(group, 1)
    scores_NTT = scaling * torch.einsum("ind,jnd->nij", q, k)
    return scores_NTT.masked_fill(~torch.ones(len(q), len(q), dtype=torch.bool).tril(), -1e4).log_softmax(-1)


def angles(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    angle_TD = torch.outer(torch.arange(3.0, 3 + tokens, dtype=torch.float64), torch.tensor([1.0, 0.3], dtype=torch.float64)[: channels // 2])
    return angle_TD.cos().repeat(1, 2), angle_TD.sin().repeat(1, 2)


@pytest.mark.parametrize("turned", [4, 2])
def test_softmax_metrics_are_the_curvature_of_the_divergence(turned: int) -> None:
    """The Hessian of the divergence of all probabilities in one token's q or k, summed over tokens, by automatic differentiation."""
    q_TND, k_TKD = inputs(6, 16).view(6, 4, 4) * 0.2, inputs(6, 8, 3).view(6, 2, 4) * 0.2
    cos_TD, sin_TD = angles(6, turned)
    before_NTT = attention(q_TND, k_TKD, cos_TD, sin_TD, 0.5)

    def divergence(moved_NTT: Tensor) -> Tensor:
        return (before_NTT.exp() * (before_NTT - moved_NTT)).sum()

    query_NDD, key_KDD = softmax_metrics(q_TND, k_TKD, cos_TD, sin_TD, 0.5)
    curve_q = torch.autograd.functional.hessian(lambda q: divergence(attention(q, k_TKD, cos_TD, sin_TD, 0.5)), q_TND)
    curve_k = torch.autograd.functional.hessian(lambda k: divergence(attention(q_TND, k, cos_TD, sin_TD, 0.5)), k_TKD)
    for found, curve in ((query_NDD, curve_q), (key_KDD, curve_k)):
        for n in range(len(found)):
            torch.testing.assert_close(found[n] * 0.25, sum(curve[t, n, :, t, n, :] for t in range(6)), rtol=1e-6, atol=1e-8)


def naive_metrics(q_TND: Tensor, k_TKD: Tensor, turn: Tensor, seen_TS: Tensor, before_PKD: Tensor, some: range) -> tuple[Tensor, Tensor]:
    """Pair by pair: turn (T, D, D) is R of each token, q R a query after RoPE; scores are not scaled."""
    past, group = len(before_PKD), q_TND.shape[1] // k_TKD.shape[1]
    query_NDD, key_KDD = torch.zeros(q_TND.shape[1], 4, 4, dtype=torch.float64), torch.zeros(k_TKD.shape[1], 4, 4, dtype=torch.float64)
    for i in some:
        for n in range(q_TND.shape[1]):
            seen = [j for j in range(seen_TS.shape[1]) if seen_TS[i, j]]
            keys = {j: before_PKD[j, n // group] if j < past else k_TKD[j - past, n // group] @ turn[j - past] for j in seen}
            q_D = q_TND[i, n] @ turn[i]
            p = dict(zip(seen, torch.stack([q_D @ keys[j] for j in seen]).softmax(0), strict=True))
            mean_D = sum((p[j] * keys[j] for j in seen), torch.zeros(4, dtype=torch.float64))
            for j in seen:
                away_D = (keys[j] - mean_D) @ turn[i].T
                query_NDD[n] += p[j] * torch.outer(away_D, away_D)
                if j >= past:
                    seen_D = q_D @ turn[j - past].T
                    key_KDD[n // group] += p[j] * (1 - p[j]) * torch.outer(seen_D, seen_D)
    return query_NDD, key_KDD


@pytest.mark.parametrize("turned", [4, 2, 0])
@pytest.mark.parametrize("every", [1, 2, 3, 9])
def test_softmax_metrics_pair_by_pair(turned: int, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a prefix, a mask, some of the queries, and without RoPE; in several pieces."""
    monkeypatch.setattr("planish.quant.solvers.attention.TOKENS", 3)
    q_TND, k_TKD, before_PKD = inputs(7, 16).view(7, 4, 4) * 0.3, inputs(7, 8, 3).view(7, 2, 4) * 0.3, inputs(2, 8, 4).view(2, 2, 4) * 0.3
    seen_TS = torch.ones(7, 9, dtype=torch.bool).tril(2)
    seen_TS[5:, 2:4] = False  # out of a window
    cos_TD, sin_TD = angles(7, turned)
    turn = rope(torch.eye(4, dtype=torch.float64).expand(7, 4, 4), cos_TD, sin_TD)
    found = softmax_metrics(q_TND, k_TKD, cos_TD, sin_TD, 1.0, before_PKD=before_PKD, seen_TS=seen_TS, every=every)
    expected = naive_metrics(q_TND, k_TKD, turn, seen_TS, before_PKD, range(min(every, 7) - 1, 7, every))
    for metrics in zip(found, expected, strict=True):
        torch.testing.assert_close(*metrics, rtol=1e-9, atol=1e-12)
    for past in (0, 2):  # with no mask a query attends to all of the prefix, itself and all before it
        before, seen_TS = before_PKD[:past], torch.ones(7, past + 7).tril(past) > 0
        found = softmax_metrics(q_TND, k_TKD, cos_TD, sin_TD, 1.0, before_PKD=before if past else None, every=every)
        expected = naive_metrics(q_TND, k_TKD, turn, seen_TS, before, range(min(every, 7) - 1, 7, every))
        for metrics in zip(found, expected, strict=True):
            torch.testing.assert_close(*metrics, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[3]], ids=format_name)
def test_heads_anywhere_among_the_rows(fmt: WeightFormat) -> None:
    """Rows of heads as `solve_heads` alone, the others as the solver alone, each where it was."""
    w_OI, told, metric_NDD = weights(14, 12), moments(inputs(80, 12)), heads(2, 5)
    rows_ND = torch.tensor([[1, 2, 3, 4, 5], [13, 12, 11, 10, 9]])
    found = solve_among(w_OI, fmt, told, Heads(rows_ND, metric_NDD), Gptq(), torch.float32)
    aware = solve_heads(w_OI[rows_ND.flatten()], fmt, told, metric_NDD, Gptq(), torch.float32)
    torch.testing.assert_close(hat(found.weight)[rows_ND.flatten()], hat(aware.weight), rtol=0, atol=0)
    others = [0, 6, 7, 8]
    torch.testing.assert_close(hat(found.weight)[others], hat(Gptq().solve(w_OI[others], fmt, told, torch.float32).weight), rtol=0, atol=0)
    assert (found.damping, found.repairs) == (aware.damping, aware.repairs)
    none = solve_among(w_OI[:10], fmt, told, Heads(torch.arange(10).view(2, 5), metric_NDD), Gptq(), torch.float32)
    assert len(none.weight.codes) == 10


@pytest.mark.parametrize("order", ["natural", "diagonal"])
@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_is_plain_where_rows_do_not_meet(fmt: WeightFormat, order: Any) -> None:
    """A diagonal metric, and one that cannot be factored; with a pull, and with a pull towards GPTAQ's target."""
    x_TI, w_OI = inputs(80, 12), weights(10, 12)
    told = Moments(second_II=second(x_TI), cross_II=(inputs(80, 12, 5) * 0.3).T @ x_TI, tokens=80)
    pulled = Gptaq(alpha=0.5, beta=0.1)  # in natural order: grids fitted beforehand would fit its target here, the weights there
    for metric_NDD in (torch.diag(torch.arange(5.0)).expand(2, 5, 5), torch.zeros(2, 5, 5)):
        for solver in (Gptq(order=order), Gptq(order=order, beta=0.1), pulled):
            ours = solve_heads(w_OI, fmt, told, metric_NDD, solver, torch.float32)
            torch.testing.assert_close(hat(ours.weight), hat(solver.solve(w_OI, fmt, told, torch.float32).weight), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("order", ["natural", "diagonal"])
def test_with_gptaq_rows_aim_at_its_target(order: Any) -> None:
    """As GPTQ does for weights that are the target: w (1 + P), P of the paper."""
    x_TI, w_OI, metric_NDD = inputs(80, 12), weights(10, 12), heads(2, 5)
    D_II = (inputs(80, 12, 5) * 0.3).T @ x_TI
    order_I = torch.arange(12) if order == "natural" else x_TI.square().sum(0).argsort(descending=True)
    damped_II = second(x_TI) + 0.01 * x_TI.square().sum(0).mean() * torch.eye(12)
    U_II = torch.linalg.cholesky(torch.linalg.inv(damped_II[order_I][:, order_I]), upper=True)
    P_II = 0.5 * (D_II[order_I][:, order_I] @ U_II.T).triu(1) @ U_II
    target_OI = w_OI + (w_OI[:, order_I] @ P_II)[:, order_I.argsort()]
    told = Moments(second_II=second(x_TI), cross_II=D_II, tokens=80)
    ours = solve_heads(w_OI, INT4, told, metric_NDD, Gptaq(alpha=0.5, order=order), torch.float32)
    theirs = solve_heads(target_OI, INT4, told, metric_NDD, Gptq(order=order), torch.float32)
    torch.testing.assert_close(hat(ours.weight), hat(theirs.weight), rtol=1e-6, atol=1e-9)


def test_heads_are_independent_and_dead_channels_get_zero() -> None:
    x_TI, w_OI, metric_NDD = inputs(80, 12), weights(10, 12), heads(2, 5)
    x_TI[:, 3] = 0
    told = moments(x_TI)
    together = hat(solve_heads(w_OI, INT4, told, metric_NDD, Gptq(), torch.float32).weight)
    apart = [hat(solve_heads(w_OI[n * 5 :][:5], INT4, told, metric_NDD[n : n + 1], Gptq(), torch.float32).weight) for n in range(2)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-6, atol=1e-9)
    assert not together[:, 3].any()


def test_float32_is_as_good_as_float64_and_the_scale_of_the_metric_does_not_matter() -> None:
    w_OI, told, metric_NDD = weights(24, 36), moments(inputs(200, 36)), heads(2, 12)
    errors = []
    for dtype in (torch.float32, torch.float64):
        half = Moments(second_II=told.second_II.to(dtype), tokens=1)
        found = solve_heads(w_OI.to(dtype), INT4, half, metric_NDD, Gptq(), torch.bfloat16).weight
        assert found.scale.dtype == torch.float32
        errors.append(score_error(w_OI, hat(found), told.second_II, metric_NDD))
    assert errors[0] < 1.02 * errors[1]
    scaled = solve_heads(w_OI, INT4, told, metric_NDD * 2.0**-30, Gptq(), torch.bfloat16).weight
    assert torch.equal(scaled.codes, found.codes)


def test_repairs_of_the_hessian_are_told() -> None:
    x_TI = inputs(80, 12)
    x_TI[:, 3] = x_TI[:, 8]
    ours = solve_heads(weights(10, 12), INT4, moments(x_TI), heads(2, 5), Gptq(damping=0.0), torch.float32)
    plain = Gptq(damping=0.0).solve(weights(10, 12), INT4, moments(x_TI), torch.float32)
    assert (ours.damping, ours.repairs) == (plain.damping, plain.repairs)
    assert ours.repairs > 0


def test_refused() -> None:
    told = moments(inputs(80, 12))
    for words, arguments in {
        "output channels": (weights(10, 12), INT4, told, torch.zeros(2, 4, 4)),
        "NaN or Inf": (weights(10, 12), INT4, told, torch.full((2, 5, 5), math.nan)),
        "one scale": (weights(10, 12), WeightFormat(bits=4, granularity="tensor"), told, heads(2, 5)),
        "calibration": (weights(10, 12), INT4, None, heads(2, 5)),
    }.items():
        with pytest.raises(PlanishError, match=words):
            solve_heads(*arguments, Gptq(), torch.float32)
