"""The pull towards the original weights against column updates in full, alone and with GPTAQ's target, and what it does."""

import math
from typing import Any

import pytest
import torch
from helpers_solvers import FORMATS, format_name, hat, inputs, output_error, pulled_gptaq, second, weights
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.formats import WeightFormat
from planish.quant.solvers import Clip, Gptaq, Gptq, Moments, Rtn

INT4 = WeightFormat(bits=4)


def moments(x_TI: Tensor, full_TI: Tensor) -> Moments:
    return Moments(second_II=second(x_TI), cross_II=(full_TI - x_TI).T @ x_TI, tokens=len(x_TI))


def streams(channels: int = 48) -> tuple[Tensor, Tensor]:
    """Inputs behind quantized predecessors, and full-precision ones."""
    full_TI = inputs(90, channels)
    return full_TI * 0.8 + 0.3 * inputs(90, channels, 7), full_TI


@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
@pytest.mark.parametrize("order", ["natural", "diagonal"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_equals_the_column_updates(fmt: WeightFormat, order: Any, beta: float) -> None:
    w_OI, (x_TI, full_TI) = weights(6, 48), streams()
    told = moments(x_TI, full_TI)
    sequence = list(range(48)) if order == "natural" else told.second_II.diagonal().argsort(descending=True, stable=True).tolist()
    for alpha in (None, 0.5) if beta else (None,):  # grids are fitted to GPTAQ's target only where there is a pull towards it
        settings = {"order": order, "beta": beta, "block_size": 5}
        solver = Gptq(**settings) if alpha is None else Gptaq(alpha=alpha, **settings)
        fast = solver.solve(w_OI, fmt, told, torch.float32)
        D_II = None if alpha is None else told.cross_II
        twin = pulled_gptaq(w_OI, told.second_II, D_II, fmt, 0.01, alpha or 0.0, beta, sequence, torch.float32)
        torch.testing.assert_close(hat(fast.weight), twin, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_targets_are_another_form_of_offsets(fmt: WeightFormat) -> None:
    """GPTAQ with a pull that does nothing is GPTAQ, on grids that were fitted beforehand."""
    w_OI, told = weights(6, 48), moments(*streams())
    tiny, none = (Gptaq(alpha=0.5, order="diagonal", beta=beta).solve(w_OI, fmt, told, torch.float32) for beta in (1e-15, 0.0))
    torch.testing.assert_close(hat(tiny.weight), hat(none.weight), rtol=1e-6, atol=1e-9)


def test_grids_that_fit_the_target_lose_less() -> None:
    """As they do wherever there is a pull; without one, GPTAQ's grids fit what earlier groups have made of the weights."""
    w_OI, (x_TI, full_TI) = weights(48, 24), streams(24)
    solutions = [Gptaq(alpha=1.0, beta=beta).solve(w_OI, INT4, moments(x_TI, full_TI), torch.float32) for beta in (1e-15, 0.0)]
    errors = [float((x_TI @ hat(solution.weight).T - full_TI @ w_OI.T).norm()) for solution in solutions]
    assert errors[0] < 0.98 * errors[1]


@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
@pytest.mark.parametrize("order", ["natural", "diagonal"])
def test_a_full_pull_is_rounding_to_nearest(fmt: WeightFormat, order: Any) -> None:
    w_OI, x_TI = weights(6, 48), inputs(90, 48)
    found = Gptq(beta=1.0, order=order, clip=Clip()).solve(w_OI, fmt, moments(x_TI, x_TI), torch.float32).weight
    assert torch.equal(found.codes, Rtn(clip=Clip()).solve(w_OI, fmt, None, torch.float32).weight.codes)


def test_the_pull_costs_on_the_calibration_inputs() -> None:
    w_OI, x_TI = weights(64, 72), inputs(100, 72)
    hats = [hat(Gptq(beta=beta).solve(w_OI, INT4, moments(x_TI, x_TI), torch.float32).weight) for beta in (0.0, 0.1, 0.3, 0.6)]
    errors = [output_error(w_OI, hat_OI, second(x_TI)) for hat_OI in hats]
    assert errors == sorted(errors)


@pytest.mark.parametrize("beta", [-0.1, 1.5, math.nan])
def test_impossible_beta_is_refused(beta: float) -> None:
    with pytest.raises(PlanishError, match=r"solver\.beta"):
        Gptq(beta=beta)
    with pytest.raises(PlanishError, match=r"solver\.beta"):
        Gptaq(beta=beta)
