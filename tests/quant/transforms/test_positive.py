"""Blocks of second moments as calibration delivers them, and the basis that two of them share."""

import pytest
import torch
from helpers_transforms import normal, outliers, second
from hypothesis import given
from hypothesis import strategies as st

from planish.quant.errors import PlanishError
from planish.quant.transforms.positive import FLOOR, common_basis, level, positive_blocks


@pytest.mark.parametrize("block", [1, 3, 4, 12])
def test_blocks_are_cut_out_and_damped(block: int) -> None:
    x_CC, w_CC = second(outliers(20, 12)), second(normal(9, 12))
    x_KBB, w_KBB, alive_K = positive_blocks(x_CC.float(), w_CC.float(), block, 0.1)
    assert bool(alive_K.all())
    for found_KBB, moments_CC in ((x_KBB, x_CC), (w_KBB, w_CC)):
        assert found_KBB.dtype is torch.float64
        for k in range(12 // block):
            cut_BB = moments_CC[k * block : (k + 1) * block, k * block : (k + 1) * block]
            wanted_BB = cut_BB + 0.1 * cut_BB.trace() / block * torch.eye(block)
            torch.testing.assert_close(found_KBB[k], wanted_BB, rtol=1e-6, atol=1e-6 * float(cut_BB.abs().max()))


@pytest.mark.parametrize("zero", [0, 1], ids=["input", "weights"])
def test_a_block_that_is_zero_in_one_is_the_identity_in_both(zero: int) -> None:
    x_CC, w_CC = second(outliers(20, 6)), second(normal(9, 6))
    (x_CC, w_CC)[zero][2:4] = 0
    (x_CC, w_CC)[zero][:, 2:4] = 0
    x_KBB, w_KBB, alive_K = positive_blocks(x_CC, w_CC, 2, 0.01)
    assert alive_K.tolist() == [True, False, True]
    assert torch.equal(x_KBB[1], torch.eye(2))
    assert torch.equal(w_KBB[1], torch.eye(2))
    T_KBB = level(common_basis(x_KBB, w_KBB), alive_K)
    assert torch.equal(T_KBB[1], torch.eye(2))
    assert T_KBB.dtype is torch.float32
    assert float(torch.linalg.slogdet(T_KBB[alive_K].double()).logabsdet.sum()) == pytest.approx(0, abs=1e-6)
    assert torch.equal(level(T_KBB, torch.zeros(3, dtype=torch.bool)), torch.eye(2).expand(3, 2, 2))


@given(st.integers(1, 7), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_the_common_basis_makes_both_the_same_diagonal(block: int, tokens: int, rows: int, seed: int) -> None:
    """Of any rank: both are what the damping and the floor make of them."""
    x_1BB, w_1BB, _ = positive_blocks(second(outliers(tokens, block, seed)), second(normal(rows, block, seed=seed)), block, 0.01)
    T_BB = common_basis(x_1BB, w_1BB)[0]
    inverse_BB = torch.linalg.inv(T_BB)
    x_BB, w_BB = T_BB.T @ x_1BB[0] @ T_BB, inverse_BB @ w_1BB[0] @ inverse_BB.T
    diagonal_B = x_BB.diagonal()
    torch.testing.assert_close(x_BB, torch.diag(diagonal_B), rtol=0, atol=1e-8 * float(diagonal_B.max()))
    torch.testing.assert_close(w_BB, x_BB, rtol=0, atol=1e-8 * float(diagonal_B.max()))
    assert bool((diagonal_B.diff() <= 1e-9 * diagonal_B.max()).all())


def test_without_damping_the_floor_keeps_it_invertible() -> None:
    x_TC = normal(2, 8)
    x_1BB, w_1BB, _ = positive_blocks(second(x_TC), second(normal(3, 8)), 8, 0.0)
    T_1BB = common_basis(x_1BB, w_1BB)
    assert bool(T_1BB.isfinite().all())
    assert float(torch.linalg.cond(T_1BB)[0]) < 2 / FLOOR


def test_what_is_refused() -> None:
    eye_CC = torch.eye(6)
    for block in (0, -1, 4, 12):
        with pytest.raises(PlanishError, match=f"6 channels cannot have blocks of {block}"):
            positive_blocks(eye_CC, eye_CC, block, 0.01)
    with pytest.raises(PlanishError, match=r"second moments of the weights have shape \(5, 5\), but should be \(6, 6\)"):
        positive_blocks(eye_CC, torch.eye(5), 2, 0.01)
    with pytest.raises(PlanishError, match="second moments of the input hold NaN or Inf"):
        positive_blocks(eye_CC * torch.inf, eye_CC, 6, 0.01)
