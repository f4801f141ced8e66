"""auto: what it refuses, what it takes, what it says; and planish.quant.trial against naive loops over candidates."""

import math
from dataclasses import replace

import pytest
import torch
from helpers_transforms import dense_chain, normal, outliers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat
from planish.quant.transforms.auto import Auto, Candidate, cost, written
from planish.quant.transforms.factors import Blocks, Hadamard, Kronecker, Permutation, Reflection, Scale, Shift, rounded
from planish.quant.transforms.inputs import Cat, Center, SiteView, Wush, chain_of
from planish.quant.transforms.inputs import Hadamard as HadamardStep
from planish.quant.trial import ROWS, STAND_IN, Trial, decided, output_error

C = 24
W4A4 = Scheme(weights=WeightFormat(bits=4), activations=ActivationFormat(bits=4, symmetric=False))
CANDIDATES: tuple[Candidate, ...] = ((), (Cat(block=1, hadamard=False),), (HadamardStep(),), (Center(), Cat(block=8)), (Wush(block=8),))


def view(x_TC: Tensor, *weights: Tensor) -> SiteView:
    x_TC = x_TC.float()
    return SiteView(x_TC, x_TC.T @ x_TC / len(x_TC), x_TC.mean(0), tuple(w.float() for w in weights))


def trial(scheme: Scheme = W4A4, seed: int = 0, ratios: tuple[float, ...] = (1.0, 0.9, 0.8)) -> Trial:
    x_TC = outliers(96, C, seed)
    return Trial(view(x_TC[:64], normal(10, C, seed=seed + 5), normal(6, C, seed=seed + 6)), x_TC[64:].float(), scheme, ratios)


def naive_codes(row: Tensor, bits: int, clip: float, *, symmetric: bool) -> Tensor:
    """One token or one output channel, on its own grid."""
    low, high = min(0.0, float(row.min())) * clip, max(0.0, float(row.max())) * clip
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = max(-low, high) / highest if symmetric else (high - low) / (highest - lowest)
    zero = 0 if symmetric else max(lowest, min(highest, round(lowest - low / scale)))
    return torch.tensor([(max(lowest, min(highest, round(float(v) / scale + zero))) - zero) * scale for v in row], dtype=torch.float64)


def naive_error(T_CC: Tensor, shift_C: Tensor, given: Trial) -> float:
    """Output by output and token by token, in float64, for dense matrices; the clip is searched on the tokens fitted to."""
    W = torch.cat(given.fit.weights).double()
    W_T = W @ torch.linalg.inv(T_CC).T
    act, fmt = given.scheme.activations, given.scheme.weights
    assert fmt is not None
    W_Q = STAND_IN.solve(W_T.float(), fmt, None, torch.float32).weight.dequantize().double()
    fit, held = ((x.double() - shift_C) @ T_CC for x in (given.fit.sample_TC, given.held_TC))

    def coded(x: Tensor, clip: float) -> Tensor:
        return x if act is None else torch.stack([naive_codes(row, act.bits, clip, symmetric=act.symmetric) for row in x])

    clip = min(given.ratios, key=lambda ratio: float(((coded(fit, ratio) - fit) @ W_T.T).square().sum()))
    off = coded(held, clip) @ W_Q.T - held @ W_T.T
    return math.sqrt(float(off.square().sum() / (given.held_TC.double() @ W.T).square().sum()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "scheme", [W4A4, Scheme(weights=WeightFormat(bits=3)), Scheme(weights=WeightFormat(bits=8), activations=ActivationFormat(bits=4))]
)
def test_naive_loops_give_the_same_errors_and_choice(seed: int, scheme: Scheme) -> None:
    auto, given = Auto(candidates=CANDIDATES, margin=0.05), trial(scheme, seed)
    errors = []
    for candidate in ((), *CANDIDATES[1:]):
        chain = chain_of(candidate, given.fit)
        shift_C = sum((factor.center_C for factor in chain if isinstance(factor, Shift)), torch.zeros(C))
        errors.append(naive_error(dense_chain(chain, C), shift_C.double(), given))
    found = decided(auto, (), (), given)
    assert found.errors == pytest.approx(errors, rel=2e-3)
    best, cheapest = min(errors), 0
    for i, error in enumerate(errors):
        near, nearest = error <= 1.05 * best, errors[cheapest] <= 1.05 * best
        if near and (not nearest or (found.costs[i], error) < (found.costs[cheapest], errors[cheapest])):
            cheapest = i
    assert found.chosen == cheapest
    assert found.names[found.chosen] == written(auto.tried[cheapest])


def test_steps_before_and_after_are_part_of_what_is_measured() -> None:
    given, auto = trial(), Auto(candidates=((HadamardStep(),),))
    found = decided(auto, [Center()], [Cat(block=8)], given)
    for candidate, error in zip(auto.tried, found.errors, strict=True):
        assert error == pytest.approx(output_error(chain_of([Center(), *candidate, Cat(block=8)], given.fit), given))


def test_candidates_are_measured_as_they_will_be_stored() -> None:
    given = replace(trial(), stored=torch.bfloat16)
    found = decided(Auto(candidates=((Cat(block=8),),)), [Center()], (), given)
    first = rounded(chain_of([Center()], given.fit), torch.bfloat16)
    behind = rounded(chain_of([Cat(block=8)], given.fit.through(first)), torch.bfloat16)
    assert found.errors == pytest.approx((output_error(first, given), output_error((*first, *behind), given)), rel=1e-9)


def test_a_clip_that_is_not_searched_is_the_formats() -> None:
    assert W4A4.activations is not None
    clipped = replace(W4A4, activations=replace(W4A4.activations, clip=0.8))
    assert output_error((), trial(clipped, ratios=(1.0,))) == output_error((), trial(W4A4, ratios=(0.8,)))
    assert output_error((), trial(clipped, ratios=(1.0,))) != output_error((), trial(W4A4, ratios=(1.0,)))


def test_what_is_kept_out_of_the_codes_costs_nothing() -> None:
    given = trial()
    assert output_error((), given, kept=C) == 0
    assert output_error((), given, kept=8) < output_error((), given)


def test_without_weights_only_activations_count() -> None:
    given = trial(Scheme(weights=WeightFormat(bits=2)))
    assert output_error((), given, weights=False) == 0
    assert output_error((), given) > 0.1


def test_a_clip_that_does_not_help_is_not_taken_and_one_that_does_is() -> None:
    wide_TC, w_OC = normal(96, 256), normal(16, 256, seed=1)
    scheme = Scheme(weights=WeightFormat(bits=8), activations=ActivationFormat(bits=3))
    given = Trial(view(wide_TC[:64], w_OC), wide_TC[64:].float(), scheme)
    assert output_error((), replace(given, ratios=(1.0, 0.8))) < 0.95 * output_error((), given)
    assert output_error((), replace(given, ratios=(1.0, 0.01))) == output_error((), given)


def test_rows_are_evenly_those_of_all_readers() -> None:
    weights = [torch.arange(n)[:, None].expand(n, 2).float() for n in (ROWS, 2 * ROWS, 3)]
    given = Trial(SiteView(torch.ones(1, 2), torch.eye(2), torch.ones(2), tuple(weights)), torch.ones(1, 2), W4A4)
    assert len(given.rows_OC) in range(ROWS // 2, ROWS + 3)
    assert {float(row[0]) for row in given.rows_OC} >= {0.0, 4.0, 508.0}


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 200)), min_size=3, max_size=3), st.floats(0, 0.9))
def test_the_cheapest_within_the_margin_is_taken(pairs: list[tuple[float, float]], margin: float) -> None:
    errors, costs = [error for error, _ in pairs], [price for _, price in pairs]
    choice = Auto(candidates=((HadamardStep(),), (Cat(),)), margin=margin).choose(errors, costs)
    least = min(errors)
    assert errors[choice.chosen] <= least * (1 + margin)
    assert all(costs[i] >= costs[choice.chosen] for i, error in enumerate(errors) if error <= least * (1 + margin))


def test_candidates_that_fail_are_not_taken() -> None:
    auto = Auto(candidates=((HadamardStep(),), (Cat(),)))
    assert auto.choose([math.nan, math.inf, 0.5], [0, 1, 2]).chosen == 2
    with pytest.raises(PlanishError, match="NaN or Inf"):
        auto.choose([math.nan, math.inf, math.nan], [0, 1, 2])


def test_an_input_that_is_flat_is_left_alone() -> None:
    """Uniform inputs and weights: a rotation would give them tails."""
    generator = torch.Generator().manual_seed(0)
    x_TC, w_OC = (torch.rand(n, C, generator=generator) - 0.5 for n in (400, 64))
    given = Trial(view(x_TC[:300], w_OC), x_TC[300:], W4A4)
    assert decided(Auto(candidates=((HadamardStep(),), (Cat(block=1),))), (), (), given).names[0] == "none"
    assert decided(Auto(candidates=((HadamardStep(),), (Cat(block=1),))), (), (), given).chosen == 0


def test_channels_of_different_size_are_scaled() -> None:
    x_TC, w_OC = normal(400, C).float(), normal(64, C, seed=3).float()
    x_TC *= torch.logspace(0, 2, C)
    given = Trial(view(x_TC[:300], w_OC), x_TC[300:], W4A4)
    found = decided(Auto(candidates=((Cat(block=1, hadamard=False),),)), (), (), given)
    assert found.chosen == 1
    assert found.errors[1] < 0.8 * found.errors[0]


def test_costs_rise_from_diagonals_over_hadamards_to_blocks() -> None:
    diagonal, hadamard, blocks = Scale(torch.ones(64)), Hadamard(64), Blocks(torch.eye(32).repeat(2, 1, 1))
    assert 0 == cost(()) < cost((diagonal,)) == cost((Shift(torch.ones(64)),)) == cost((Permutation(torch.arange(64)),))
    assert cost((diagonal,)) < cost((hadamard,)) < cost((Hadamard(64, torch.ones(64)),)) < cost((blocks,))
    assert cost((diagonal, hadamard)) == cost((diagonal,)) + cost((hadamard,))
    assert cost((Kronecker(torch.eye(4), torch.eye(16)), Reflection(torch.zeros(64, 3)))) == 4 + 16 + 2 * 3


def test_blocks_of_one_channel_are_a_scale() -> None:
    given = trial()
    scale, hadamard = chain_of([Cat(block=1)], given.fit)
    assert (type(scale), type(hadamard)) == (Scale, Hadamard)


def test_names() -> None:
    assert [written(candidate) for candidate in CANDIDATES[:4]] == ["none", "cat {block: 1, hadamard: false}", "hadamard", "shift + cat {block: 8}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": ()}, "auto.candidates has nothing to choose from"),
        ({"candidates": ((),)}, "auto.candidates has nothing to choose from"),
        ({"candidates": ((Cat(),), (Cat(block=128),))}, "auto.candidates.1 is there twice, as 0 too"),
        ({"candidates": ((Center(), Cat(sites=("0.*",))),)}, "auto.candidates.0.1: sites is for the whole step"),
        ({"held_out": 0.0}, "auto.held_out is 0.0"),
        ({"held_out": 1.0}, "auto.held_out is 1.0"),
        ({"margin": -0.1}, "auto.margin is -0.1"),
        ({"margin": 1.0}, "auto.margin is 1.0"),
    ],
)
def test_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PlanishError, match=message.replace(".", r"\.")):
        Auto(**settings)  # type: ignore[arg-type]
