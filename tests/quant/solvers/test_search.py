"""Choosing settings by held-out text: the objective against the sum over tokens, the choice against trying by hand, what is refused."""

from dataclasses import replace

import pytest
import torch
from helpers_solvers import hat, inputs, second, weights
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.formats import WeightFormat
from planish.quant.solvers import Gptaq, Gptq, Moments
from planish.quant.solvers.search import SEARCH_ROWS, choose, held_out_error

INT4 = WeightFormat(bits=4)


def told(x_TI: Tensor, full_TI: Tensor | None = None) -> Moments:
    return Moments(second_II=second(x_TI), tokens=len(x_TI), cross_II=None if full_TI is None else (full_TI - x_TI).T @ x_TI)


def streams(tokens: int, seed: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """A quantized stream and the full-precision one, whose differences are partly the same function of the inputs everywhere."""
    x_TI = inputs(tokens, 12, seed)
    common_II = torch.eye(12).double() + 0.02 * inputs(12, 12, 9)
    return x_TI, x_TI @ common_II + noise * inputs(tokens, 12, seed + 50)


def both_texts() -> Moments:
    return in_two_parts(told(*streams(40, 1)), told(*streams(20, 2)))


def in_two_parts(fitted: Moments, held_out: Moments) -> Moments:
    return replace(fitted, held_out=held_out)


def test_the_objective_is_that_of_the_outputs() -> None:
    """Sum over tokens of |hat x - w x_full|^2, less what the original weights lose, with and without a full-precision stream."""
    x_TI, full_TI = streams(30, 3)
    w_OI = weights(7, 12)
    hat_OI = w_OI + 0.1 * weights(7, 12, 5)
    lost, all_lost = 0.0, 0.0
    for x_I, full_I in zip(x_TI, full_TI, strict=True):
        lost += float((hat_OI @ x_I - w_OI @ full_I).square().sum())
        all_lost += float((w_OI @ (full_I - x_I)).square().sum())
    assert held_out_error(w_OI, hat_OI, told(x_TI, full_TI)) == pytest.approx(lost - all_lost)
    assert held_out_error(w_OI, hat_OI, told(x_TI)) == pytest.approx(float(((hat_OI - w_OI) @ x_TI.T).square().sum()))


def test_the_best_candidate_is_taken() -> None:
    """Of every combination, by its error on the held-out part when fitted to the other."""
    solver, both, w_OI = (
        Gptaq(alpha=(0.0, 0.5, 1.0), damping=(0.01, 0.1), order="diagonal"),
        both_texts(),
        weights(9, 12),
    )
    assert both.held_out is not None
    found = choose(solver, w_OI, INT4, both, torch.float32)
    errors = {}
    for alpha in (0.0, 0.5, 1.0):
        for damping in (0.01, 0.1):
            mine = Gptaq(alpha=alpha, damping=damping, order="diagonal").solve(w_OI, INT4, both, torch.float32)
            errors[alpha, damping] = held_out_error(w_OI, hat(mine.weight), both.held_out)
    alpha, damping = min(errors, key=lambda key: errors[key])
    assert found.settings == {"alpha": alpha, "damping": damping}
    assert found.solver == Gptaq(alpha=alpha, damping=damping, order="diagonal")
    size = float((w_OI @ both.held_out.second_II * w_OI).sum())
    assert found.judged == pytest.approx({f"damping={d:g} alpha={a:g}": error / size for (a, d), error in errors.items()})
    assert alpha > 0  # a difference that is the same everywhere is made up for


def test_what_is_noise_is_not_made_up_for() -> None:
    """Differences that have nothing to do with the inputs, seen on few tokens: alpha 0 is best."""
    parts = [told(x, x + inputs(len(x), 12, seed + 70)) for seed, x in ((1, inputs(14, 12, 1)), (2, inputs(400, 12, 2)))]
    found = choose(Gptaq(alpha=(0.0, 1.0)), weights(64, 12), WeightFormat(bits=8), in_two_parts(parts[0], parts[1]), torch.float32)
    assert found.settings == {"alpha": 0.0}


def test_some_rows_are_enough() -> None:
    """A tall weight is judged by some of its rows."""
    both, w_OI = both_texts(), weights(2 * SEARCH_ROWS, 12)
    tall, some = (choose(Gptq(beta=(0.0, 0.3)), w, INT4, both, torch.float32) for w in (w_OI, w_OI[::2]))
    assert tall.judged == some.judged


def test_nothing_to_choose() -> None:
    solver = Gptaq(alpha=0.5)
    found = choose(solver, weights(5, 12), INT4, told(*streams(30, 1)), torch.float32)
    assert (found.solver, found.settings, found.judged) == (solver, {}, {})
    assert solver.held_share == 0
    assert Gptq(damping=(0.01, 0.1)).held_share == 0.25
    assert Gptq(damping=(0.01, 0.1), held_out=0.5).held_share == 0.5
    dead = in_two_parts(told(torch.zeros(4, 12)), told(torch.zeros(4, 12)))
    assert choose(Gptq(beta=(0.3, 0.0)), weights(5, 12), INT4, dead, torch.float32).settings == {"beta": 0.3}


def test_refused() -> None:
    for words, settings in {
        "held_out is 0.5, but nothing is": {"held_out": 0.5},
        "held_out is 1.0, but it is a part": {"held_out": 1.0, "beta": (0.0, 0.1)},
        "at least 2": {"damping": (0.1,)},
        "all different": {"damping": (0.1, 0.1)},
        "damping is 3.0": {"damping": (0.1, 3.0)},
        "alpha is -1": {"alpha": -1.0},
    }.items():
        with pytest.raises(PlanishError, match=words):
            Gptaq(**settings)  # type: ignore[arg-type]
    several = Gptaq(alpha=(0.0, 0.5))
    with pytest.raises(PlanishError, match="no text was held out"):
        choose(several, weights(5, 12), INT4, told(*streams(30, 1)), torch.float32)
    with pytest.raises(PlanishError, match="Choose one before solving"):
        several.solve(weights(5, 12), INT4, told(*streams(30, 1)), torch.float32)
