"""The pull towards the original weights against the papers' column updates, alone and with GPTAQ's target."""

import math

import pytest
import torch
from helpers_solvers import FORMATS, foem, format_name, hat, inputs, output_error, second, weights
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.formats import WeightFormat
from planish.quant.solvers import Gptaq, Gptq, Moments

INT4 = WeightFormat(bits=4)


def moments(x_TI: Tensor, full_TI: Tensor) -> Moments:
    return Moments(second_II=second(x_TI), cross_II=(full_TI - x_TI).T @ x_TI, tokens=len(x_TI))


def streams() -> tuple[Tensor, Tensor]:
    """Inputs behind quantized predecessors, and full-precision ones."""
    full_TI = inputs(90, 24)
    return full_TI * 0.8 + 0.3 * inputs(90, 24, 7), full_TI


@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
@pytest.mark.parametrize("order", ["natural", "diagonal"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_equals_the_column_updates(fmt: WeightFormat, order: str, beta: float) -> None:
    w_OI, (x_TI, full_TI) = weights(6, 24), streams()
    told = moments(x_TI, full_TI)
    sequence = list(range(24)) if order == "natural" else told.second_II.diagonal().argsort(descending=True, stable=True).tolist()
    for alpha in (None, 0.5) if beta else (None,):  # grids are fitted to GPTAQ's target only where there is a pull towards it
        settings = {"order": order, "beta": beta, "block_size": 5}
        solver = Gptq(**settings) if alpha is None else Gptaq(alpha=alpha, **settings)
        fast = solver.solve(w_OI, fmt, told, torch.float32)
        D_II = None if alpha is None else told.cross_II
        twin = foem(w_OI, told.second_II, D_II, fmt, 0.01, alpha or 0.0, beta, sequence, torch.float32)
        torch.testing.assert_close(hat(fast.weight), twin, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_targets_are_another_form_of_offsets(fmt: WeightFormat) -> None:
    """GPTAQ with a pull that does nothing is GPTAQ, on grids that were fitted beforehand."""
    w_OI, told = weights(6, 24), moments(*streams())
    tiny, none = (Gptaq(alpha=0.5, order="diagonal", beta=beta).solve(w_OI, fmt, told, torch.float32) for beta in (1e-15, 0.0))
    torch.testing.assert_close(hat(tiny.weight), hat(none.weight), rtol=1e-6, atol=1e-9)


def test_grids_that_fit_the_target_lose_less() -> None:
    """As they do wherever there is a pull; without one, GPTAQ's grids fit what earlier groups have made of the weights."""
    w_OI, (x_TI, full_TI) = weights(48, 24), streams()
    solutions = [Gptaq(alpha=1.0, beta=beta).solve(w_OI, INT4, moments(x_TI, full_TI), torch.float32) for beta in (1e-15, 0.0)]
    errors = [float((x_TI @ hat(solution.weight).T - full_TI @ w_OI.T).norm()) for solution in solutions]
    assert errors[0] < 0.97 * errors[1]


def test_a_full_pull_remembers_one_column() -> None:
    """Each column rounds its own weight and what the one before it owes."""
    w_OI, x_TI = weights(6, 24), inputs(90, 24)
    told = moments(x_TI, x_TI)
    found = Gptq(beta=1.0, damping=0.0).solve(w_OI, INT4, told, torch.float32).weight
    L_II = torch.linalg.cholesky(told.second_II.flip(0, 1), upper=True).flip(0, 1)
    for k in range(1, 24):
        moved_O = w_OI[:, k] + (w_OI - hat(found))[:, k - 1] * L_II[k, k - 1] / L_II[k, k]
        assert torch.equal(found.codes[:, k].double(), (moved_O / found.scale[:, 0]).round().clamp(-8, 7))


def test_the_pull_costs_error_on_the_calibration_inputs() -> None:
    w_OI, x_TI = weights(32, 72), inputs(400, 72)
    told = moments(x_TI, x_TI)
    errors = [output_error(w_OI, hat(Gptq(beta=beta).solve(w_OI, INT4, told, torch.float32).weight), told.second_II) for beta in (0.0, 0.1, 0.5, 1.0)]
    assert errors == sorted(errors)


@pytest.mark.parametrize("beta", [-0.1, 1.5, math.nan])
def test_impossible_beta_is_refused(beta: float) -> None:
    with pytest.raises(PlanishError, match=r"solver\.beta"):
        Gptq(beta=beta)
    with pytest.raises(PlanishError, match=r"solver\.beta"):
        Gptaq(beta=beta)
