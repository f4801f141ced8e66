"""GPTAQ against least squares on the inputs themselves, and what its alpha buys."""

import math

import pytest
import torch
from helpers_solvers import format_name, hat, inputs, least_squares_gptaq, second, weights

from planish.quant.errors import PlanishError
from planish.quant.formats import WeightFormat
from planish.quant.solvers import Clip, Gptaq, Gptq, Moments

FORMATS = [
    WeightFormat(bits=4),
    WeightFormat(bits=4, symmetric=False),
    WeightFormat(bits=4, granularity="tensor"),
    WeightFormat(bits=4, symmetric=False, granularity="group", group_size=6),
]


def streams(tokens, channels, gap=0.3):
    """Full-precision inputs, and what is left of them behind quantized predecessors: coarse, and off by a correlated part."""
    full_TI = inputs(tokens, channels)
    noise = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return full_TI, full_TI * (1 - gap) + gap * noise @ torch.linalg.qr(noise[:channels].T @ noise[:channels]).Q


def moments(full_TI, x_TI):
    return Moments(second_II=second(x_TI), cross_II=(full_TI - x_TI).T @ x_TI, tokens=len(x_TI))


@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("block_size", [5, 128])
def test_equals_least_squares_on_the_inputs(fmt, alpha, block_size):
    full_TI, x_TI = streams(90, 24)
    w_OI = weights(6, 24)
    fast = Gptaq(alpha=alpha, block_size=block_size).solve(w_OI, fmt, moments(full_TI, x_TI), torch.float32)
    twin = least_squares_gptaq(w_OI, x_TI, full_TI, fmt, 0.01, alpha, torch.float32)
    torch.testing.assert_close(hat(fast.weight), twin, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("order", ["natural", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_error_to_the_full_outputs_falls_with_alpha(fmt, order, dtype):
    full_TI, x_TI = streams(600, 72)
    w_OI = weights(24, 72)
    told = moments(full_TI.to(dtype), x_TI.to(dtype))
    solvers = [Gptq(order=order), *(Gptaq(order=order, alpha=alpha) for alpha in (0.25, 0.5, 1.0))]
    errors = [float((x_TI @ hat(s.solve(w_OI.to(dtype), fmt, told, torch.float32).weight).T - full_TI @ w_OI.T).norm()) for s in solvers]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


@pytest.mark.parametrize("order", ["natural", "diagonal"])
@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_is_gptq_without_a_gap_or_with_alpha_zero(fmt, order):
    full_TI, x_TI = streams(90, 24)
    w_OI = weights(6, 24)
    for solver, told in ((Gptaq(order=order, alpha=0.0), moments(full_TI, x_TI)), (Gptaq(order=order, alpha=1.0), moments(x_TI, x_TI))):
        plain = Gptq(order=order).solve(w_OI, fmt, told, torch.float32)
        torch.testing.assert_close(hat(solver.solve(w_OI, fmt, told, torch.float32).weight), hat(plain.weight), rtol=1e-6, atol=1e-9)


def test_diagonal_order_is_natural_order_of_sorted_channels():
    full_TI, x_TI = streams(90, 24)
    w_OI, fmt = weights(6, 24), WeightFormat(bits=4)
    order = x_TI.square().sum(0).argsort(descending=True)
    diagonal = Gptaq(alpha=1.0, order="diagonal").solve(w_OI, fmt, moments(full_TI, x_TI), torch.float32)
    natural = Gptaq(alpha=1.0).solve(w_OI[:, order], fmt, moments(full_TI[:, order], x_TI[:, order]), torch.float32)
    assert torch.equal(diagonal.weight.codes[:, order], natural.weight.codes)


def test_rows_are_independent():
    full_TI, x_TI = streams(90, 24)
    w_OI, fmt, told = weights(6, 24), WeightFormat(bits=4), moments(full_TI, x_TI)
    solver = Gptaq(alpha=0.5, clip=Clip())
    together = hat(solver.solve(w_OI, fmt, told, torch.float32).weight)
    torch.testing.assert_close(together, torch.cat([hat(solver.solve(w[None], fmt, told, torch.float32).weight) for w in w_OI]), rtol=1e-6, atol=1e-9)


def test_a_singular_hessian_is_repaired():
    full_TI, x_TI = streams(90, 24)
    x_TI[:, 3] = 0
    solution = Gptaq(damping=0.0).solve(weights(6, 24), WeightFormat(bits=4), moments(full_TI, torch.zeros_like(x_TI)), torch.float32)
    assert math.isinf(solution.damping)
    solution = Gptaq().solve(weights(6, 24), WeightFormat(bits=4), moments(full_TI, x_TI), torch.float32)
    assert solution.repairs == 0
    assert not hat(solution.weight)[:, 3].any()


def test_cross_moments_are_needed():
    with pytest.raises(PlanishError, match="full-precision"):
        Gptaq().solve(weights(3, 4), WeightFormat(bits=4), Moments(second_II=torch.eye(4), tokens=1), torch.float32)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan])
def test_impossible_alpha_is_refused(alpha):
    with pytest.raises(PlanishError, match=r"solver\.alpha"):
        Gptaq(alpha=alpha)
    with pytest.raises(PlanishError, match=r"solver\.damping"):
        Gptaq(damping=-1.0)
