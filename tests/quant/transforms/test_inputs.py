"""What steps see of a site: behind a chain the view of what comes out of it; and what they make of it."""

import pytest
import torch
from helpers_transforms import dense_chain, normal, outliers, second
from torch import Tensor

from planish.quant.transforms import Cat, Center, ClipSearch, Duquant, Hadamard, Wush
from planish.quant.transforms.duquant import duquant
from planish.quant.transforms.factors import Blocks, Chain, Kronecker, Permutation, Scale, Shift, on_input, on_weight
from planish.quant.transforms.factors import Hadamard as HadamardFactor
from planish.quant.transforms.inputs import SiteView, chain_of, divisor
from planish.quant.transforms.rotation import random_signs

C = 12


def view(x_TC: Tensor, *weights: Tensor) -> SiteView:
    return SiteView(x_TC, second(x_TC) / len(x_TC), x_TC.mean(0), weights)


def drawn() -> SiteView:
    return view(outliers(50, C), normal(5, C, seed=3), normal(7, C, seed=4))


def assert_same(found: SiteView, wanted: SiteView) -> None:
    for mine, twin in ((found.sample_TC, wanted.sample_TC), (found.second_CC, wanted.second_CC), (found.mean_C, wanted.mean_C)):
        torch.testing.assert_close(mine, twin, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.weights, wanted.weights, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.readers_CC, sum((second(w_OC) for w_OC in wanted.weights), torch.zeros(C, C).double()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "chain",
    [
        (),
        (Shift(normal(C, seed=5)),),
        (Blocks(normal(3, 4, 4, seed=6)),),
        (Scale(normal(C, seed=7).exp()), Shift(normal(C, seed=8)), Kronecker(normal(3, 3, seed=9), normal(4, 4, seed=10)), Shift(normal(C))),
        (Permutation(torch.arange(C).flip(0)), HadamardFactor(C, random_signs(C, 1)), Shift(normal(C, seed=5))),
    ],
    ids=["none", "shift", "blocks", "mixed", "rotated"],
)
def test_behind_a_chain_is_the_view_of_what_comes_out_of_it(chain: Chain) -> None:
    seen = drawn()
    assert_same(seen.through(chain), view(on_input(chain, seen.sample_TC), *(on_weight(chain, w_OC)[0] for w_OC in seen.weights)))


def test_each_step_sees_what_those_before_it_left() -> None:
    seen = drawn()
    _, scale, blocks, hadamard = chain_of([Center(), Cat(block=1, hadamard=False), Cat(block=4)], seen)
    centred = view(seen.sample_TC - seen.mean_C, *seen.weights)
    torch.testing.assert_close(dense_chain((scale,), C), dense_chain(Cat(block=1, hadamard=False).chain(centred), C))
    T_CC = dense_chain((scale,), C)
    scaled = view(centred.sample_TC @ T_CC, *(w_OC @ torch.linalg.inv(T_CC).T for w_OC in seen.weights))
    torch.testing.assert_close(dense_chain((blocks, hadamard), C), dense_chain(Cat(block=4).chain(scaled), C), rtol=1e-5, atol=1e-5)


def test_the_center_is_the_mean_of_all_tokens_or_the_middle_of_the_sample() -> None:
    seen = SiteView(torch.tensor([[1.0, -4], [5, 0]]), torch.eye(2), torch.tensor([7.0, 8]), ())
    assert [Center(by=by).chain(seen)[0].tensors()["center"].tolist() for by in ("mean", "middle")] == [[7, 8], [3, -2]]


def test_of_several_draws_of_signs_the_one_with_the_least_ranges() -> None:
    seen = drawn()

    def range_of(factor: HadamardFactor) -> float:
        return float(torch.stack([(token.max() - token.min()) ** 2 for token in factor.on_input(seen.sample_TC)]).mean())

    ranges = [range_of(HadamardFactor(C, random_signs(C, seed))) for seed in range(8)]
    (found,) = Hadamard(seeds=8).chain(seen)
    assert isinstance(found, HadamardFactor)
    assert range_of(found) == pytest.approx(min(ranges))
    assert min(ranges) < 0.99 * ranges[0]
    assert Hadamard().chain(seen)[0].tensors() == {}


@pytest.mark.parametrize("inner", [True, False])
def test_wush_gives_every_channel_the_same_energy(inner: bool) -> None:
    """In one block; whichever of the two Hadamards it is."""
    seen = view(outliers(60, C), normal(40, C, seed=3))
    T_CC = dense_chain(Wush(block=C, damping=1e-6, inner=inner).chain(seen), C)
    energies_C = (T_CC.T @ seen.second_CC @ T_CC).diagonal()
    torch.testing.assert_close(energies_C, energies_C.mean().expand(C), rtol=1e-3, atol=0)


@pytest.mark.parametrize("step", [Cat(block=4, damping=0.5), Wush(block=4, damping=0.5)], ids=["cat", "wush"])
def test_damping_counts(step: Cat | Wush) -> None:
    """Of both moments, relative to the mean diagonal of each block: afterwards what is damped is the same in input and weights."""
    seen = drawn()
    T_BB = step.chain(seen)[0].tensors()["matrix"][0].double()
    x_BB, w_BB = (cut + 0.5 * cut.trace() / 4 * torch.eye(4) for cut in (seen.second_CC[:4, :4], seen.readers_CC[:4, :4]))
    moved_BB, inverse_BB = T_BB.T @ x_BB @ T_BB, torch.linalg.inv(T_BB)
    other_BB = inverse_BB @ w_BB @ inverse_BB.T
    torch.testing.assert_close(moved_BB / moved_BB.trace(), other_BB / other_BB.trace(), rtol=0, atol=1e-5)


def test_duquant_by_its_settings() -> None:
    seen = drawn()
    for mine, twin in zip(Duquant(block=5, steps=3, seed=2).chain(seen), duquant(seen.sample_TC, 4, 3, 2), strict=True):
        assert all(torch.equal(mine.tensors()[name], twin.tensors()[name]) for name in twin.tensors())


def test_divisors_and_ratios() -> None:
    assert [divisor(12, block) for block in (1, 5, 6, 11, 12, 100)] == [1, 4, 6, 6, 12, 12]
    assert ClipSearch(least=0.9).ratios() == [1, 0.975, 0.95, 0.925, 0.9]
    assert ClipSearch(least=0.5, step=0.2).ratios() == [1, 0.8, 0.6]
    assert ClipSearch(least=1.0).ratios() == [1]
