"""GPTQ against the textbook: one column at a time, the inverse updated explicitly."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers_solvers import FORMATS, format_name, hat, inputs, obq_gptq, output_error, second, weights

from planish.quant.errors import PlanishError
from planish.quant.formats import WeightFormat
from planish.quant.solvers import Clip, Gptq, Moments, Rtn
from planish.quant.solvers.cholesky import factor

INT4 = WeightFormat(bits=4)
GROUP = WeightFormat(bits=4, granularity="group", group_size=6)


def moments(H_II):
    return Moments(second_II=H_II, tokens=1)


def solve(w_OI, H_II, fmt, scale_dtype=torch.float32, **settings):
    return Gptq(**settings).solve(w_OI, fmt, moments(H_II), scale_dtype)


@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
@pytest.mark.parametrize("order", ["natural", "diagonal"])
@pytest.mark.parametrize("block_size", [1, 5, 128])
def test_equals_the_explicit_inverse_in_float64(fmt, order, block_size):
    w_OI, H_II = weights(7, 48), second(inputs(80, 48))
    H_II[5] = H_II[:, 5] = 0
    fast = solve(w_OI, H_II, fmt, order=order, block_size=block_size)
    torch.testing.assert_close(hat(fast.weight), obq_gptq(w_OI, H_II, fmt, 0.01, order, torch.float32), rtol=1e-6, atol=1e-9)
    assert (fast.damping, fast.repairs) == (0.01, 0)


@pytest.mark.parametrize("fmt", [INT4, WeightFormat(bits=4, granularity="group", group_size=32)], ids=format_name)
@pytest.mark.parametrize("order", ["natural", "diagonal"])
def test_float32_is_as_good_as_float64(fmt, order):
    w_OI, H_II = weights(40, 192), second(inputs(500, 192))
    fast = hat(solve(w_OI.float(), H_II.float(), fmt, torch.bfloat16, order=order).weight)
    twin = obq_gptq(w_OI, H_II, fmt, 0.01, order, torch.bfloat16)
    assert output_error(w_OI, fast, H_II) < output_error(w_OI, twin, H_II) * 1.02
    assert ((fast - twin).abs() < 1e-6).double().mean() > 0.95


@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
@pytest.mark.parametrize("order", ["natural", "diagonal"])
@pytest.mark.parametrize("clip", [None, Clip()], ids=["plain", "clip"])
def test_output_error_is_below_rounding(fmt, order, clip):
    w_OI, H_II = weights(32, 96), second(inputs(400, 96))
    rounded = hat(Rtn(clip=clip).solve(w_OI, fmt, None, torch.float32).weight)
    ours = hat(solve(w_OI, H_II, fmt, order=order, clip=clip).weight)
    assert output_error(w_OI, ours, H_II) < 0.8 * output_error(w_OI, rounded, H_II)


@hypothesis.given(
    out=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.integers(2, 9),
    block_size=st.integers(1, 40),
    seed=st.integers(0, 99),
    symmetric=st.booleans(),
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_block_size_changes_nothing(out, groups, size, block_size, seed, symmetric):
    fmt = WeightFormat(bits=4, symmetric=symmetric, granularity="group", group_size=size)
    w_OI, H_II = weights(out, groups * size, seed), second(inputs(50, groups * size, seed))
    w_OI[-1] = 0
    blocked = hat(solve(w_OI, H_II, fmt, block_size=block_size).weight)
    torch.testing.assert_close(blocked, hat(solve(w_OI, H_II, fmt, block_size=1000).weight), rtol=1e-6, atol=1e-9)
    assert not blocked[-1].any()


@pytest.mark.parametrize("order", ["natural", "diagonal"])
def test_rows_are_independent(order):
    w_OI, H_II = weights(9, 48), second(inputs(80, 48))
    for fmt in (INT4, GROUP):
        together = hat(solve(w_OI, H_II, fmt, order=order, clip=Clip()).weight)
        apart = torch.cat([hat(solve(row[None], H_II, fmt, order=order, clip=Clip()).weight) for row in w_OI])
        torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-9)


def test_uncorrelated_inputs_are_rounded_to_nearest():
    w_OI = weights(6, 12).float()
    solution = solve(w_OI, torch.diag(torch.arange(1.0, 13.0)), INT4)
    assert torch.equal(solution.weight.codes, Rtn().solve(w_OI, INT4, None, torch.float32).weight.codes)


def test_one_column():
    w_O1 = weights(4, 1).float()
    assert torch.equal(hat(solve(w_O1, torch.ones(1, 1), INT4).weight), hat(Rtn().solve(w_O1, INT4, None, torch.float32).weight))


def test_orders_agree_where_the_diagonal_already_falls():
    x = inputs(80, 48)
    x = x[:, x.square().sum(0).argsort(descending=True)]
    w_OI = weights(7, 48)
    natural, diagonal = (solve(w_OI, second(x), INT4, order=order).weight for order in ("natural", "diagonal"))
    assert torch.equal(natural.codes, diagonal.codes)


def test_diagonal_order_keeps_the_grids_of_the_natural_groups():
    w_OI = weights(7, 48)
    assert torch.equal(
        solve(w_OI, second(inputs(80, 48)), GROUP, order="diagonal").weight.scale, Rtn().solve(w_OI, GROUP, None, torch.float32).weight.scale
    )


def test_scale_of_the_hessian_does_not_matter():
    w_OI, H_II = weights(7, 48), second(inputs(80, 48))
    H_II[3] = H_II[:, 3] = 0
    assert torch.equal(solve(w_OI, H_II, INT4).weight.codes, solve(w_OI, H_II * 2.0**-30, INT4).weight.codes)


def test_damping_is_relative_to_what_ordinary_tokens_make_of_the_hessian():
    """The rest of its trace is of a massive activation, which would drown all channels but its own in damping."""
    w_OI, H_II = weights(7, 24), second(inputs(80, 24))
    H_II[3, 3] += 99 * H_II.trace()
    told = Moments(second_II=H_II, tokens=1, ordinary=0.01)
    solution = Gptq(damping=0.5).solve(w_OI, INT4, told, torch.float32)
    assert solution.damping == pytest.approx(0.005)
    assert torch.equal(solution.weight.codes, solve(w_OI, H_II, INT4, damping=0.005).weight.codes)
    assert not torch.equal(solution.weight.codes, solve(w_OI, H_II, INT4, damping=0.5).weight.codes)


@pytest.mark.parametrize("order", ["natural", "diagonal"])
@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_rows_in_pieces_are_rows_together(fmt, order, monkeypatch):
    """One scale for the whole weight is fitted to all of it."""
    w_OI, H_II = weights(7, 48), second(inputs(80, 48))
    together = solve(w_OI, H_II, fmt, order=order).weight
    monkeypatch.setattr("planish.quant.solvers.gptq.PIECE", 2 * 48)
    apart = solve(w_OI, H_II, fmt, order=order).weight
    assert apart.scale.shape == together.scale.shape
    torch.testing.assert_close(hat(apart), hat(together), rtol=1e-6, atol=1e-9)


def test_where_all_channels_were_always_zero_weights_are_rounded_to_nearest():
    w_OI = weights(6, 12).float()
    found = solve(w_OI, torch.zeros(12, 12), INT4)
    assert torch.equal(found.weight.codes, Rtn().solve(w_OI, INT4, None, torch.float32).weight.codes)


def test_dead_channels_get_weight_zero_and_leave_the_grid_alone():
    w_OI, x = weights(7, 24), inputs(80, 24)
    x[:, [2, 9]] = 0
    w_OI[:, 2] = 100
    ours = hat(solve(w_OI, second(x), INT4).weight)
    alive = [i for i in range(24) if i not in (2, 9)]
    assert not ours[:, [2, 9]].any()
    torch.testing.assert_close(ours[:, alive], hat(solve(w_OI[:, alive], second(x[:, alive]), INT4).weight))


def test_weights_and_hessian_are_not_written_to():
    w_OI, H_II = weights(7, 24), second(inputs(80, 24))
    before = w_OI.clone(), H_II.clone()
    solve(w_OI, H_II, INT4)
    assert torch.equal(w_OI, before[0])
    assert torch.equal(H_II, before[1])


def deficient():
    """Integer inputs, two channels equal: exactly singular."""
    x = torch.randint(-3, 4, (50, 12), generator=torch.Generator().manual_seed(0)).double()
    x[:, 7] = x[:, 4]
    return second(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("H_II", "least", "most"),
    [
        (deficient(), 1e-4, 1e-3),
        (torch.ones(12, 12), 1e-4, 1e-2),
        (second(inputs(50, 12)) - 1e-3 * torch.linalg.eigvalsh(second(inputs(50, 12)))[-1] * torch.eye(12), 0.0, 1.0),
        (torch.zeros(12, 12), math.inf, math.inf),
        (torch.full((12, 12), 1.0) - 2 * torch.eye(12), 1.0, 10.0),
        (1e4 - torch.eye(12) * (1e4 - 1), math.inf, math.inf),
    ],
    ids=["rank deficient", "rank one", "slightly indefinite", "zero", "negative diagonal", "hopeless"],
)
def test_a_hessian_that_is_not_positive_definite_is_repaired(H_II, least, most, dtype):
    w_OI = weights(5, 12).to(dtype)
    solution = solve(w_OI, H_II.to(dtype), INT4, damping=0.0)
    assert least <= solution.damping <= most
    assert solution.repairs > 0
    error, rounded = (
        output_error(w_OI.double(), h, H_II.double()) for h in (hat(solution.weight), hat(Rtn().solve(w_OI, INT4, None, torch.float32).weight))
    )
    if math.isinf(solution.damping):
        assert error == rounded
    elif (torch.linalg.eigvalsh(H_II.double()) > -1e-9).all():
        assert error < rounded


@pytest.mark.parametrize(
    ("short", "damping", "found"),
    [
        (0.0, 0.0, (1e-4, 1)),
        (3e-3, 0.0, (0.01, 3)),
        (3e-2, 2e-3, (0.2, 2)),
        (3.0, 2e-3, (math.inf, 4)),
        (30.0, 0.0, (math.inf, 7)),
        (30.0, 5.0, (math.inf, 1)),
    ],
)
def test_damping_is_raised_tenfold_until_it_is_enough(short, damping, found):
    """The least eigenvalue is -short, mean diagonal 1."""
    solved = factor(torch.tensor([[1.0, 1 + short], [1 + short, 1.0]], dtype=torch.float64), damping)
    assert (solved.damping, solved.repairs) == (pytest.approx(found[0]), found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_pivot_that_is_noise_is_not_taken_for_one(dtype):
    """Two channels are equal, and what rounding leaves of the second is as often above zero as below."""
    for seed in range(12):
        x_TI = inputs(50, 12, seed)
        x_TI[:, 7] = x_TI[:, 4]
        assert factor(second(x_TI).to(dtype), 0.0).damping == 1e-4


def test_float64_is_tried_before_the_damping_is_raised():
    H_II = torch.tensor([[1.0, 1 - 2.0**-20], [1 - 2.0**-20, 1.0]])
    found = factor(H_II, 0.0)
    assert (found.damping, found.repairs) == (0.0, 0)
    assert found.lower_II.dtype == torch.float32
    upper_II = torch.linalg.cholesky(torch.linalg.inv(H_II.double()), upper=True)
    torch.testing.assert_close(found.lower_II.double(), upper_II.inverse().T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_are_named(value):
    H_II = second(inputs(50, 12))
    H_II[3, 4] = value
    with pytest.raises(PlanishError, match="NaN or Inf"):
        solve(weights(3, 12), H_II, INT4)


@pytest.mark.parametrize("bad", [{"damping": -0.1}, {"damping": math.nan}, {"block_size": 0}, {"order": "random"}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(PlanishError, match=f"solver.{next(iter(bad))}"):
        Gptq(**bad)


def test_moments_are_needed_and_must_fit():
    with pytest.raises(PlanishError, match="calibration"):
        Gptq().solve(weights(3, 12), INT4, None, torch.float32)
    with pytest.raises(PlanishError, match="11 channels"):
        solve(weights(3, 12), torch.eye(11), INT4)
    with pytest.raises(PlanishError, match="cross_II"):
        Moments(second_II=torch.eye(4), cross_II=torch.eye(3), tokens=1)


def test_the_factor_is_lower_and_of_the_damped_hessian():
    H_II = second(inputs(80, 24))
    L_II = factor(H_II, 0.01).lower_II
    assert torch.equal(L_II, L_II.tril())
    torch.testing.assert_close(L_II.T @ L_II, H_II + 0.01 * H_II.diagonal().mean() * torch.eye(24))
