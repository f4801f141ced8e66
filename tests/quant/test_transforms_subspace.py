"""Subspaces against power iteration and layers computed in full; QUAD's norm against the norm it stands for."""

import math

import pytest
import torch
from helpers_solvers import inputs, second, weights
from torch import Tensor, nn

from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat
from planish.quant.linear import quantize_input
from planish.quant.transforms.factors import Reflection, on_input, on_weight
from planish.quant.transforms.subspace import principal, reflected, widened, widened_norm


def top_projector(H_CC: Tensor, rank: int) -> Tensor:
    """P P' of the top eigenvectors, by subspace iteration."""
    basis_CR = weights(len(H_CC), rank)
    for _ in range(3000):
        basis_CR = torch.linalg.qr(H_CC @ basis_CR).Q
    return basis_CR @ basis_CR.T


@pytest.mark.parametrize(("channels", "rank"), [(16, 4), (24, 4), (23, 3), (20, 1), (2, 1)])
def test_the_first_channels_span_the_top_eigenvectors(channels: int, rank: int) -> None:
    H_CC = second(inputs(200, channels))
    M_CC = principal(H_CC, rank).matrix_KBB[0].double()
    torch.testing.assert_close(M_CC @ M_CC.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(M_CC[:, :rank] @ M_CC[:, :rank].T, top_projector(H_CC, rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("channels", "rank"), [(16, 4), (24, 8), (23, 3), (20, 15), (20, 1), (2, 1)])
def test_a_reflection_has_the_same_first_channels(channels: int, rank: int) -> None:
    x_TC, w_OC = inputs(200, channels).float(), weights(7, channels).float()
    chain = reflected(second(x_TC.double()), rank)
    assert isinstance(chain[0], Reflection)
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


def test_channels_of_a_part_have_the_same_mean_square() -> None:
    H_CC = second(inputs(200, 24))
    M_CC = principal(H_CC, 4).matrix_KBB[0].double()  # parts of 4 and 20: Hadamard matrices exist
    inside, outside = (M_CC.T @ H_CC @ M_CC).diagonal().split([4, 20])
    values = torch.linalg.eigvalsh(H_CC)
    for part, expected in ((inside, values[-4:].mean()), (outside, values[:-4].mean())):
        torch.testing.assert_close(part, expected.expand(len(part)), rtol=1e-5, atol=0)


def test_the_layer_stays_the_same_and_quantizes_better() -> None:
    x_TC, w_OC = inputs(200, 24).float(), weights(7, 24).float()
    factor = principal(second(x_TC), 4)
    y_TC = factor.on_input(x_TC)
    torch.testing.assert_close(y_TC @ factor.on_weight(w_OC).T, x_TC @ w_OC.T, rtol=1e-4, atol=1e-4)
    four, eight = ActivationFormat(bits=4), ActivationFormat(bits=8)
    plain = quantize_input(x_TC, four).dequantize() - x_TC
    parts = torch.cat([quantize_input(y_TC[:, :4], eight).dequantize(), quantize_input(y_TC[:, 4:], four).dequantize()], 1) - y_TC
    assert parts.norm() < 0.6 * plain.norm()


def test_seeds_differ_and_repeat() -> None:
    H_CC = second(inputs(200, 23))
    for make in (lambda seed: principal(H_CC, 3, seed).matrix_KBB, lambda seed: widened(H_CC, 3, seed)):
        assert torch.equal(make(1), make(1))
        assert not torch.allclose(make(1), make(2))


@pytest.mark.parametrize(("channels", "rank"), [(16, 4), (23, 3), (20, 1)])
def test_the_widened_stream_computes_the_same(channels: int, rank: int) -> None:
    x_TC = inputs(200, channels)
    H_CC, reader_OC, writer_CO = second(x_TC), weights(7, channels), weights(channels, 7, 2)
    Q_CS = widened(H_CC, rank).double()
    torch.testing.assert_close(Q_CS @ Q_CS.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(Q_CS[:, :rank] @ Q_CS[:, :rank].T, top_projector(H_CC, rank), rtol=0, atol=1e-5)
    x_TS = x_TC @ Q_CS
    torch.testing.assert_close(x_TS @ (reader_OC @ Q_CS).T, x_TC @ reader_OC.T, rtol=1e-5, atol=1e-5)
    h_TO = weights(200, 7, 3)
    torch.testing.assert_close((x_TS + h_TO @ (Q_CS.T @ writer_CO).T) @ Q_CS.T, x_TC + h_TO @ writer_CO.T, rtol=1e-5, atol=1e-5)
    outside_TC = x_TC - x_TC @ top_projector(H_CC, rank)
    torch.testing.assert_close(x_TS[:, rank:].norm(dim=1), outside_TC.norm(dim=1), rtol=1e-4, atol=1e-4)


def test_a_stock_norm_over_the_widened_stream_needs_another_weight_and_eps() -> None:
    x_TC, eps = inputs(40, 20) * 1e-2, 1e-3
    Q_CS = widened(second(x_TC), 5).double()
    expected = nn.functional.rms_norm(x_TC, (20,), eps=eps) @ Q_CS
    weight, stock_eps = widened_norm(20, 5, eps)
    stock = nn.functional.rms_norm(x_TC @ Q_CS, (25,), eps=stock_eps) * weight
    torch.testing.assert_close(stock, expected, rtol=1e-5, atol=1e-6)
    assert (nn.functional.rms_norm(x_TC @ Q_CS, (25,), eps=eps) - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("rank", [0, 8, -1])
def test_impossible_ranks_are_refused(rank: int) -> None:
    for make in (principal, reflected, widened):
        with pytest.raises(PlanishError, match="1 to 7"):
            make(torch.eye(8), rank)


def test_nan_is_named() -> None:
    with pytest.raises(PlanishError, match="NaN or Inf"):
        principal(torch.full((4, 4), math.nan), 1)
