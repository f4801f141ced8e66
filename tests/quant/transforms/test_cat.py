"""CAT against the geometric mean by another way, and against what it promises: nothing has a smaller product of energies."""

import pytest
import scipy.linalg
import torch
from helpers_transforms import assert_layer_stays, dense, normal, outliers, second
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.quant.transforms.cat import cat, cat_blocks
from planish.quant.transforms.factors import Hadamard
from planish.quant.transforms.scale_rms import rms_scale


def geometric_mean(A_BB: Tensor, B_BB: Tensor) -> Tensor:
    """A # B: where the arithmetic and the harmonic mean of two matrices meet when each takes the other's place (Bhatia 2007, section 4.1)."""
    for _ in range(60):
        A_BB, B_BB = (A_BB + B_BB) / 2, 2 * torch.linalg.inv(torch.linalg.inv(A_BB) + torch.linalg.inv(B_BB))
    return A_BB


def textbook(x_CC: Tensor, w_CC: Tensor, block: int, damping: float) -> Tensor:
    """Block by block, (C, C) float64."""
    blocks = []
    for start in range(0, len(x_CC), block):
        cut_x, cut_w = x_CC[start : start + block, start : start + block], w_CC[start : start + block, start : start + block]
        eye = torch.eye(block, dtype=torch.float64)
        damped_x, damped_w = (cut + damping * cut.trace() / block * eye for cut in (cut_x, cut_w))
        blocks.append(torch.from_numpy(scipy.linalg.sqrtm(geometric_mean(torch.linalg.inv(damped_x), damped_w).numpy()).real))
    T_CC = torch.block_diag(*blocks)
    return T_CC / torch.linalg.slogdet(T_CC).logabsdet.div(len(T_CC)).exp()


@pytest.mark.parametrize(("channels", "block"), [(12, 12), (12, 4), (15, 5), (9, 1), (7, 7), (1, 1)])
def test_the_geometric_mean(channels: int, block: int) -> None:
    x_CC, w_CC = second(outliers(40, channels)), second(normal(20, channels, seed=9))
    factor = cat_blocks(x_CC, w_CC, block, 0.02)
    assert factor.matrix_KBB.dtype is torch.float32
    assert factor.matrix_KBB.is_contiguous()
    assert torch.equal(factor.matrix_KBB, factor.matrix_KBB.mT)
    torch.testing.assert_close(dense(factor, channels), textbook(x_CC, w_CC, block, 0.02), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_both_moments_become_the_same_and_the_layer_stays(block: int, count: int, tokens: int, rows: int, seed: int) -> None:
    channels = block * count
    x_CC, w_CC = second(outliers(tokens, channels, seed)), second(normal(rows, channels, seed=seed + 7))
    factor = cat_blocks(x_CC, w_CC, block, 0.02)
    assert_layer_stays((factor,), channels, tolerance=1e-6)
    for k, T_BB in enumerate(factor.matrix_KBB.double()):
        cut = slice(k * block, (k + 1) * block)
        damped_x, damped_w = (m[cut, cut] + 0.02 * m[cut, cut].trace() / block * torch.eye(block) for m in (x_CC, w_CC))
        moved_x, moved_w = T_BB @ damped_x @ T_BB, torch.linalg.inv(T_BB) @ damped_w @ torch.linalg.inv(T_BB)
        torch.testing.assert_close(moved_x / moved_x.trace(), moved_w / moved_w.trace(), rtol=0, atol=1e-4)


@given(st.integers(2, 6), st.integers(0, 99))
def test_no_other_transform_has_a_smaller_product_of_energies(channels: int, seed: int) -> None:
    x_CC, w_CC = second(outliers(30, channels, seed)), second(normal(20, channels, seed=seed + 7))

    def energies(T_CC: Tensor) -> float:
        inverse_CC = torch.linalg.inv(T_CC)
        return float((T_CC.T @ x_CC @ T_CC).trace() * (inverse_CC @ w_CC @ inverse_CC.T).trace())

    T_CC = cat_blocks(x_CC, w_CC, channels, 0.0).matrix_KBB[0].double()
    least = energies(T_CC)
    assert least <= energies(torch.eye(channels, dtype=torch.float64)) * (1 + 1e-6)
    for size in (1e-2, 1e-1, 1.0):
        assert least <= energies(T_CC @ (torch.eye(channels) + size * normal(channels, channels, seed=seed))) * (1 + 1e-6)


def test_blocks_of_one_channel_are_the_scale_from_second_moments() -> None:
    x_CC, w_CC = second(outliers(30, 9)), second(normal(20, 9))
    divisor_C = rms_scale(x_CC.diagonal(), w_CC.diagonal(), 1.0)
    torch.testing.assert_close(cat_blocks(x_CC, w_CC, 1, 0.0).matrix_KBB.flatten(), 1 / divisor_C)


def test_sums_and_means_are_the_same() -> None:
    x_CC, w_CC = second(outliers(30, 8)), second(normal(20, 8))
    torch.testing.assert_close(cat_blocks(x_CC / 30, w_CC * 7, 4, 0.02).matrix_KBB, cat_blocks(x_CC, w_CC, 4, 0.02).matrix_KBB)


def test_the_hadamard_that_follows() -> None:
    x_CC, w_CC = second(outliers(30, 24)), second(normal(20, 24))
    blocks, hadamard = cat(x_CC, w_CC, 8, 0.02)
    assert isinstance(hadamard, Hadamard)
    assert hadamard.block == 24
    assert_layer_stays((blocks, hadamard), 24, tolerance=1e-6)
    assert len(cat(x_CC, w_CC, 8, 0.02, hadamard=False)) == 1
    assert len(cat(torch.eye(9), torch.eye(9), 3, 0.02)) == 1


def test_a_dead_block_is_left_alone() -> None:
    x_TC = outliers(30, 6)
    x_TC[:, 3:] = 0
    matrix_KBB = cat_blocks(second(x_TC), second(normal(20, 6)), 3, 0.02).matrix_KBB
    assert torch.equal(matrix_KBB[1], torch.eye(3))
    assert torch.equal(cat_blocks(torch.zeros(6, 6), torch.eye(6), 3, 0.02).matrix_KBB, torch.eye(3).expand(2, 3, 3))
