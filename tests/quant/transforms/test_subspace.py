"""Subspaces against power iteration and layers computed in full."""

import math

import pytest
import torch
from helpers_solvers import inputs, second, weights
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat
from planish.quant.linear import quantize_input
from planish.quant.transforms import Lorc, Quad, Resq, SuperWeights, Svdquant
from planish.quant.transforms.factors import Hadamard, Reflection, on_input, on_weight
from planish.quant.transforms.subspace import _eigenvectors, reflected


def top_projector(H_CC: Tensor, rank: int) -> Tensor:
    """P P' of the top eigenvectors, by subspace iteration."""
    basis_CR = weights(len(H_CC), rank)
    for _ in range(3000):
        basis_CR = torch.linalg.qr(H_CC @ basis_CR).Q
    return basis_CR @ basis_CR.T


@pytest.mark.parametrize(("channels", "rank"), [(16, 4), (24, 8), (23, 3), (20, 15), (20, 1), (2, 1)])
def test_a_reflection_has_the_same_first_channels(channels: int, rank: int) -> None:
    x_TC, w_OC = inputs(200, channels).float(), weights(7, channels).float()
    chain = reflected(second(x_TC.double()), rank)
    assert isinstance(chain[0], Reflection)
    blocks = [factor.block for factor in chain[1:] if isinstance(factor, Hadamard)]
    assert blocks == {(16, 4): [4], (24, 8): [8]}.get((channels, rank), [])  # the largest that both parts can be mixed in
    T_CC = on_input(chain, torch.eye(channels)).double()
    torch.testing.assert_close(T_CC @ T_CC.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(T_CC[:, :rank] @ T_CC[:, :rank].T, top_projector(second(x_TC.double()), rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(on_input(chain, x_TC) @ on_weight(chain, w_OC)[0].T, x_TC @ w_OC.T, rtol=1e-4, atol=1e-4)


def test_a_reflection_where_the_channels_are_the_eigenvectors_already() -> None:
    """Of a basis that is the first channels, with either sign, or lies outside of them altogether."""
    for values in ([9.0, 8, 1, 1], [1.0, 1, 9, 8], [8.0, 1, 9, 1]):
        T_CC = on_input(reflected(torch.tensor(values).diag(), 2), torch.eye(4))
        energies = (T_CC.T @ torch.tensor(values).diag() @ T_CC).diagonal()
        torch.testing.assert_close(energies, torch.tensor([8.5, 8.5, 1, 1]))


def test_eigenvectors_have_a_sign() -> None:
    """So that the same moments give the same basis, whoever computes it."""
    basis_CC = _eigenvectors(second(inputs(200, 24)), 4)
    assert all(column_C[column_C.abs().argmax()] > 0 for column_C in basis_CC.T)


def test_it_quantizes_better() -> None:
    x_TC = inputs(200, 24).float()
    y_TC = on_input(reflected(second(x_TC), 4), x_TC)
    four, eight = ActivationFormat(bits=4), ActivationFormat(bits=8)
    plain = quantize_input(x_TC, four).dequantize() - x_TC
    parts = torch.cat([quantize_input(y_TC[:, :4], eight).dequantize(), quantize_input(y_TC[:, 4:], four).dequantize()], 1) - y_TC
    assert parts.norm() < 0.6 * plain.norm()


def test_seeds_differ_and_repeat() -> None:
    one, again, other = (on_input(reflected(second(inputs(200, 24)), 4, seed), torch.eye(24)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("rank", [0, 8, -1])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(PlanishError, match="1 to 7"):
        reflected(torch.eye(8), rank)


def test_nan_is_named() -> None:
    with pytest.raises(PlanishError, match="NaN or Inf"):
        reflected(torch.full((4, 4), math.nan), 1)


def test_what_is_kept_and_what_it_takes() -> None:
    """In bits, of a layer of 24 input and 10 output channels whose numbers of full precision have 16."""
    assert [Resq(share=0.125).kept(width) for width in (4, 12, 1000)] == [1, 2, 125]
    assert [Quad(rank=4).kept(width) for width in (12, 1000)] == [4, 4]
    steps = (Quad(rank=4), Resq(share=0.25, bits=8), Lorc(rank=3), Svdquant(rank=3), SuperWeights())
    assert [step.side_bits(10, 24, 16) for step in steps] == [4 * 10 * 16, 10 * (6 * 8 + 16), 3 * 34 * 16, 3 * 34 * 16, 0]
