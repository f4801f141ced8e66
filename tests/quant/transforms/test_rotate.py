"""Rotations of the stream, of heads and across them: orthogonal, keeping the mean where that is wanted, turned back exactly."""

import pytest
import torch
from helpers_transforms import assert_layer_stays, dense_chain, normal
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from planish.quant.errors import PlanishError
from planish.quant.transforms import FoldNorms, Rotate
from planish.quant.transforms.factors import Scale, on_input
from planish.quant.transforms.hadamard import hadamard
from planish.quant.transforms.inputs import SiteView
from planish.quant.transforms.rotate import Kind, Learning, across_heads, mean_keeping, mixing, rotation_at, turned_back

KINDS: tuple[Kind, ...] = ("hadamard", "orthogonal")
kinds = st.sampled_from(KINDS)


@given(st.integers(1, 60), kinds, st.integers(0, 99))
def test_mixing_is_orthogonal_and_turns_back(n: int, kind: Kind, seed: int) -> None:
    chain = mixing(n, kind, seed)
    Q_nn = on_input(chain, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(Q_nn @ Q_nn.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(Q_nn, dense_chain(chain, n), rtol=0, atol=1e-12)
    x = normal(3, n, seed=seed).double()
    torch.testing.assert_close(turned_back(chain, on_input(chain, x)), x, rtol=0, atol=1e-12)
    assert_layer_stays(chain, n)


@given(st.integers(1, 60), kinds, st.integers(0, 99))
def test_mean_keeping_is_orthogonal_and_keeps_means(n: int, kind: Kind, seed: int) -> None:
    chain, eye_nn, ones_n = mean_keeping(n, kind, seed), torch.eye(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    Q_nn = on_input(chain, eye_nn)
    torch.testing.assert_close(Q_nn @ Q_nn.T, eye_nn, rtol=0, atol=1e-12)
    torch.testing.assert_close(Q_nn @ ones_n, ones_n, rtol=0, atol=1e-12)
    torch.testing.assert_close(ones_n @ Q_nn, ones_n, rtol=0, atol=1e-12)
    x = normal(5, n, seed=seed).double()
    torch.testing.assert_close(turned_back(chain, on_input(chain, x)), x, rtol=0, atol=1e-12)


@given(st.integers(2, 40), kinds, st.integers(0, 99))
def test_layer_norm_commutes_with_it(n: int, kind: Kind, seed: int) -> None:
    chain, norm = mean_keeping(n, kind, seed), nn.LayerNorm(n, elementwise_affine=False, dtype=torch.float64)
    x = normal(4, n, seed=seed).double() + 3
    torch.testing.assert_close(norm(on_input(chain, x)), on_input(chain, norm(x)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [36, 48, 50, 64])
def test_an_outlier_is_spread_over_all_channels(n: int, kind: Kind) -> None:
    """Widths with a Hadamard matrix and without."""
    for make in (mixing, mean_keeping):
        Q_nn = on_input(make(n, kind, 1), torch.eye(n, dtype=torch.float64))
        assert float(Q_nn.abs().max()) < 6 / n**0.5
    if kind == "hadamard" and n != 50:
        Q_nn = on_input(mixing(n, kind, 1), torch.eye(n, dtype=torch.float64))
        torch.testing.assert_close(Q_nn.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("make", [mixing, mean_keeping])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_differ_and_are_the_same_again(make: type, kind: Kind) -> None:
    eye_nn = torch.eye(24, dtype=torch.float64)
    one, same, other = (on_input(make(24, kind, seed), eye_nn) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_only_rotations_turn_back() -> None:
    with pytest.raises(TypeError, match="scale is no rotation"):
        turned_back((Scale(torch.ones(4)),), torch.ones(1, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_across_heads(kind: Kind) -> None:
    """With a rotation inside the heads it is one of all channels: H_12 ⊗ H_8."""
    step = across_heads(Rotate(at="heads", kind=kind), 12)
    assert step.sites == ("*.o",)
    x = normal(5, 96).float()
    chain = step.chain(SiteView(x, torch.eye(96), torch.zeros(96), ()))
    assert_layer_stays(chain, 96)
    inside = on_input(mixing(8, "hadamard", 0), x.reshape(5, 12, 8).double()).reshape(5, 96)
    if kind == "hadamard":
        whole_CC = torch.kron(hadamard(12), on_input(mixing(8, "hadamard", 0), torch.eye(8, dtype=torch.float64)))
        torch.testing.assert_close(on_input(chain, inside), x.double() @ whole_CC, rtol=0, atol=1e-6)


def test_across_heads_without_a_hadamard_matrix() -> None:
    with pytest.raises(PlanishError, match=r"the model has 9 heads, and there is no Hadamard matrix of that order. Use kind: orthogonal"):
        across_heads(Rotate(at="heads"), 9)
    assert across_heads(Rotate(at="heads", kind="orthogonal"), 9).left_AA.shape == (9, 9)


def test_settings_are_checked() -> None:
    for make, message in (
        (lambda: Rotate(at="residual", seeds=0), "rotate.seeds is 0"),
        (lambda: Rotate(at="heads", seeds=2), "rotate.seeds is 2, but only at residual"),
    ):
        with pytest.raises(PlanishError, match=message):
            make()


def test_what_is_left_out_of_learning_is_usual() -> None:
    assert Rotate(at="value", kind="learned", steps=7).learning == Learning(steps=7)
    assert Rotate(at="value", kind="learned", tokens=9, objective="whip").learning == Learning(tokens=9, objective="whip")


def test_the_rotation_at_a_place() -> None:
    steps = [FoldNorms(), Rotate(at="value"), Rotate(at="residual")]
    assert rotation_at(steps, "residual") is steps[2]
    assert rotation_at(steps, "heads") is None
