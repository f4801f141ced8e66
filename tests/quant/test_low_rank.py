"""Low-rank side paths against what they minimise: eigenvectors by hand, descent from the answer, and layers computed in full."""

import math

import pytest
import torch
from helpers_solvers import inputs, output_error, second, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.formats import WeightFormat
from planish.quant.low_rank import LowRank, lorc, svdquant, weighted_lorc
from planish.quant.solvers import Rtn
from planish.quant.transforms.factors import Blocks, Hadamard, Scale, Shift

INT3 = WeightFormat(bits=3)


def rounded(w_OC: Tensor) -> Tensor:
    return Rtn().solve(w_OC, INT3, None, torch.float32).weight.dequantize()


def by_eigenvectors(error_OC: Tensor, H_CC: Tensor, rank: int) -> Tensor:
    """The same minimum by another way: E H^(1/2) projected on its first right singular vectors, eigenvectors of H^(1/2) E' E H^(1/2)."""
    values, vectors = torch.linalg.eigh(H_CC)
    root_CC = vectors @ torch.diag(values.sqrt()) @ vectors.T
    first_CR = torch.linalg.eigh(root_CC @ error_OC.T @ error_OC @ root_CC).eigenvectors[:, -rank:]
    return error_OC @ root_CC @ first_CR @ first_CR.T @ torch.linalg.inv(root_CC)


@pytest.mark.parametrize("shape", [(9, 16), (16, 9), (5, 5)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_lorc_is_the_eigenvectors(shape: tuple[int, int], rank: int) -> None:
    error_OC = weights(*shape)
    low = lorc(error_OC, rank)
    assert low.down_RC.shape == (rank, shape[1])
    assert low.up_OR.shape == (shape[0], rank)
    torch.testing.assert_close(low.product(), by_eigenvectors(error_OC, torch.eye(shape[1], dtype=torch.float64), rank), rtol=0, atol=1e-7)
    torch.testing.assert_close(low.down_RC.norm(dim=1), low.up_OR.norm(dim=0), rtol=1e-5, atol=0)  # sqrt(S) each


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
@pytest.mark.parametrize("kept", [0, 2])
def test_more_rank_than_there_is(shape: tuple[int, int], kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape[0], kept, generator=generator) @ torch.randn(kept, shape[1], generator=generator)
    found = lorc(matrix, 5)
    torch.testing.assert_close(found.product().float(), matrix, rtol=0, atol=1e-5)
    assert found.down_RC.isfinite().all()


def test_two_paths_in_one() -> None:
    one, other = (LowRank(weights(rank, 16, rank), weights(9, rank, 5)) for rank in (2, 3))
    assert one.plus(None) is one
    both = one.plus(other)
    assert both.rank == 5
    torch.testing.assert_close(both.product(), one.product() + other.product())
    assert both.to(torch.bfloat16).up_OR.dtype is torch.bfloat16


@pytest.mark.parametrize("rank", [1, 4])
def test_weighted_is_the_eigenvectors_of_the_output(rank: int) -> None:
    error_OC, H_CC = weights(9, 16), second(inputs(80, 16))
    damped_CC = H_CC + 0.01 * H_CC.diagonal().mean() * torch.eye(16)
    low = weighted_lorc(error_OC, H_CC, rank, 0.01)
    torch.testing.assert_close(low.product(), by_eigenvectors(error_OC, damped_CC, rank), rtol=0, atol=1e-6)
    plain, ours = (output_error(error_OC, path.product(), damped_CC) for path in (lorc(error_OC, rank), low))
    assert ours < 0.95 * plain


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_weighted_is_a_minimum(out: int, channels: int, seed: int) -> None:
    """No step away from it makes the output's error less; at full rank nothing is left."""
    error_OC, H_CC = weights(out, channels, seed), second(inputs(30, channels, seed))
    H_CC += 0.05 * H_CC.diagonal().mean() * torch.eye(channels)
    full = min(out, channels)
    for rank in range(1, full + 1):
        low = weighted_lorc(error_OC, H_CC, rank, 0.0)
        least = output_error(error_OC, low.product(), H_CC)
        off = LowRank(low.down_RC + 1e-3 * weights(rank, channels, seed + 1), low.up_OR + 1e-3 * weights(out, rank, seed + 2))
        size = output_error(error_OC, torch.zeros_like(error_OC), H_CC)
        assert least <= output_error(error_OC, off.product(), H_CC) + 1e-9 * size
    assert least < 1e-9 * size


def test_dead_channels_are_left_out_and_the_scale_does_not_matter() -> None:
    error_OC, x = weights(9, 16), inputs(80, 16)
    x[:, 5] = 0
    error_OC[:, 5] = 100
    low = weighted_lorc(error_OC, second(x), 3)
    assert not low.down_RC[:, 5].any()
    alive = [c for c in range(16) if c != 5]
    torch.testing.assert_close(low.product()[:, alive], weighted_lorc(error_OC[:, alive], second(x[:, alive]), 3).product(), rtol=0, atol=1e-7)
    torch.testing.assert_close(low.product(), weighted_lorc(error_OC, second(x) * 2.0**-20, 3).product(), rtol=0, atol=1e-9)


def slow_svdquant(w_OC: Tensor, rank: int, H_CC: Tensor, rounds: int, damping: float) -> list[tuple[float, Tensor]]:
    """Error and low-rank part of every round, without stopping."""
    damped_CC = H_CC + damping * H_CC.diagonal().mean() * torch.eye(len(H_CC))
    low_OC, seen = by_eigenvectors(w_OC, torch.eye(len(H_CC), dtype=torch.float64), rank), []
    for _ in range(rounds + 1):
        hat_OC = rounded((w_OC - low_OC).float()).double()
        seen.append((output_error(w_OC, low_OC + hat_OC, damped_CC), low_OC))
        low_OC = by_eigenvectors(w_OC - hat_OC, damped_CC, rank)
    return seen


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_svdquant_is_its_rounds_up_to_the_first_that_does_not_help(damping: float) -> None:
    w_OC, H_CC = weights(24, 16), second(inputs(200, 16))
    w_OC[:, 3] *= 8
    seen = slow_svdquant(w_OC, 3, H_CC, 8, damping)
    best = next(i for i in range(9) if i == 8 or seen[i + 1][0] >= seen[i][0])
    assert best > 0
    low, residual_OC = svdquant(w_OC, 3, rounded, H_CC, rounds=8, damping=damping)
    torch.testing.assert_close(low.product(), seen[best][1], rtol=0, atol=1e-5)
    torch.testing.assert_close(residual_OC.double(), w_OC - low.product(), rtol=0, atol=1e-7)
    once, _ = svdquant(w_OC, 3, rounded, H_CC, rounds=0)
    torch.testing.assert_close(once.product(), seen[0][1], rtol=0, atol=1e-6)


def test_svdquant_beats_rounding_and_a_path_for_the_error_alone() -> None:
    w_OC, H_CC = weights(48, 32), second(inputs(200, 32))
    w_OC[:, 3] *= 8  # what a smoothing scale leaves in a weight
    low, residual_OC = svdquant(w_OC, 4, rounded, H_CC)
    ours = output_error(w_OC, low.product() + rounded(residual_OC).double(), H_CC)
    hat_OC = rounded(w_OC.float()).double()
    after = output_error(w_OC, hat_OC + weighted_lorc(w_OC - hat_OC, H_CC, 4).product(), H_CC)
    assert ours < 0.85 * after
    assert after < 0.85 * output_error(w_OC, hat_OC, H_CC)


def test_the_path_is_its_product_also_through_a_chain() -> None:
    x_TC, low = inputs(20, 12), lorc(weights(7, 12), 3)
    torch.testing.assert_close(low.on_input(x_TC), x_TC @ low.product().T)
    assert torch.equal(low.on_input(x_TC.bfloat16()), low.on_input(x_TC.bfloat16().float()).bfloat16())
    assert low.on_input(x_TC[0].reshape(1, 1, 12)).shape == (1, 1, 7)
    generator = torch.Generator().manual_seed(3)
    chain = (Shift(torch.randn(12, generator=generator)), Scale(torch.rand(12, generator=generator) + 0.5), Hadamard(12))
    mixed = (*chain, Blocks(torch.randn(3, 4, 4, generator=generator)))
    for some in (chain, mixed):
        through, offset_O = low.through(some)
        assert offset_O is not None
        y = x_TC
        for each in some:
            y = each.on_input(y)
        torch.testing.assert_close(through.on_input(y) + offset_O, low.on_input(x_TC), rtol=1e-4, atol=1e-4)
    assert low.through((Hadamard(12),))[1] is None


@pytest.mark.parametrize("rank", [0, 6, -1])
def test_impossible_ranks_are_refused(rank: int) -> None:
    for solve in (lambda: lorc(weights(5, 8), rank), lambda: weighted_lorc(weights(5, 8), torch.eye(8), rank)):
        with pytest.raises(PlanishError, match="1 to 5"):
            solve()


def test_factors_that_do_not_meet_and_nan_are_refused() -> None:
    with pytest.raises(PlanishError, match=r"\(R, C\)"):
        LowRank(torch.zeros(2, 8), torch.zeros(5, 3))
    with pytest.raises(PlanishError, match="NaN or Inf"):
        svdquant(weights(5, 8), 2, lambda w: w * math.nan, torch.eye(8))
