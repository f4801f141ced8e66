"""WUSH against its equation with Cholesky factors, against CAT, and against what it promises: every channel has the same energy."""

import pytest
import torch
from helpers_transforms import assert_layer_stays, normal, outliers, second
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.quant.transforms.cat import cat_blocks
from planish.quant.transforms.hadamard import hadamard, hadamard_block
from planish.quant.transforms.wush import wush_blocks


def moved(factor_BB: Tensor, x_BB: Tensor, w_BB: Tensor) -> tuple[Tensor, Tensor]:
    T_BB = factor_BB.double()
    return T_BB.T @ x_BB @ T_BB, torch.linalg.inv(T_BB) @ w_BB @ torch.linalg.inv(T_BB).T


@pytest.mark.parametrize("block", [1, 2, 4, 12])
def test_the_equation(block: int) -> None:
    """T = H S^(-1/2) U' W'^T for columns, with Cholesky factors; the columns of U are known but for their signs, so H' is taken off first."""
    x_CC, w_CC = second(outliers(40, 12)), second(normal(20, 12, seed=9))
    found_KBB = wush_blocks(x_CC, w_CC, block, 0.0).matrix_KBB.double() @ hadamard(block).T
    wanted = []
    for start in range(0, 12, block):
        cut = slice(start, start + block)
        root_x, root_w = torch.linalg.cholesky(x_CC[cut, cut]), torch.linalg.cholesky(w_CC[cut, cut])
        U, S, _ = torch.linalg.svd(root_w.T @ root_x)
        wanted.append((torch.diag(S**-0.5) @ U.T @ root_w.T).T)
    wanted_KBB = torch.stack(wanted)
    size = torch.linalg.slogdet(wanted_KBB).logabsdet.mean().div(block).exp()
    signs_K1B = (found_KBB * wanted_KBB).sum(1, keepdim=True).sign()
    torch.testing.assert_close(found_KBB * signs_K1B, wanted_KBB / size, rtol=1e-4, atol=1e-5)


@given(st.sampled_from([1, 2, 4, 8, 12, 20]), st.integers(1, 3), st.integers(0, 99))
def test_both_moments_become_the_same_with_a_constant_diagonal(block: int, count: int, seed: int) -> None:
    channels = block * count
    x_CC, w_CC = second(outliers(60, channels, seed)), second(normal(70, channels, seed=seed + 7))
    factor = wush_blocks(x_CC, w_CC, block, 0.0)
    assert_layer_stays((factor,), channels, tolerance=1e-6)
    # T is float32, and the moments' condition multiplies its rounding.
    for k, T_BB in enumerate(factor.matrix_KBB):
        cut = slice(k * block, (k + 1) * block)
        x_BB, w_BB = moved(T_BB, x_CC[cut, cut], w_CC[cut, cut])
        x_BB, w_BB = x_BB / x_BB.trace(), w_BB / w_BB.trace()
        torch.testing.assert_close(x_BB, w_BB, rtol=0, atol=1e-4)
        torch.testing.assert_close(x_BB.diagonal(), torch.full((block,), 1 / block, dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("block", [3, 6, 18, 22])
def test_where_there_is_no_hadamard_of_a_blocks_size(block: int) -> None:
    """The moments are the same still, and constant over each of the smaller Hadamards, whose energies are about the same."""
    x_CC, w_CC = second(outliers(60, block)), second(normal(70, block, seed=7))
    x_BB, w_BB = moved(wush_blocks(x_CC, w_CC, block, 0.0).matrix_KBB[0], x_CC, w_CC)
    x_BB, w_BB = x_BB / x_BB.trace(), w_BB / w_BB.trace()
    torch.testing.assert_close(x_BB, w_BB, rtol=0, atol=1e-5)
    parts = x_BB.diagonal().reshape(-1, hadamard_block(block))
    torch.testing.assert_close(parts, parts[:, :1].expand_as(parts), rtol=0, atol=1e-5)
    plain_BB, _ = moved(wush_blocks(x_CC, w_CC, block, 0.0, hadamard=False).matrix_KBB[0], x_CC, w_CC)
    sums = parts.sum(1)
    assert float(sums.max() - sums.min()) <= float(plain_BB.max() / plain_BB.trace()) + 1e-6


@pytest.mark.parametrize("block", [4, 7, 28])
def test_it_is_cat_and_a_rotation(block: int) -> None:
    """T T' is CAT's M, whatever rotation ends T; without the Hadamard both moments are diagonal."""
    x_CC, w_CC = second(outliers(60, 28)), second(normal(70, 28, seed=7))
    cat_KBB = cat_blocks(x_CC, w_CC, block, 0.02).matrix_KBB.double()
    for inner in (True, False):
        T_KBB = wush_blocks(x_CC, w_CC, block, 0.02, hadamard=inner).matrix_KBB.double()
        torch.testing.assert_close(T_KBB @ T_KBB.mT, cat_KBB @ cat_KBB, rtol=1e-4, atol=1e-5)
    x_BB, w_BB = moved(wush_blocks(x_CC, w_CC, 28, 0.0, hadamard=False).matrix_KBB[0], x_CC, w_CC)
    torch.testing.assert_close(x_BB, torch.diag(x_BB.diagonal()), rtol=0, atol=1e-5 * float(x_BB.max()))
    torch.testing.assert_close(w_BB, torch.diag(w_BB.diagonal()), rtol=0, atol=1e-5 * float(w_BB.max()))


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.booleans())
def test_any_rank_and_dead_blocks(block: int, tokens: int, rows: int, seed: int, inner: bool) -> None:
    x_TC = outliers(tokens, 3 * block, seed)
    x_TC[:, :block] = 0
    factor = wush_blocks(second(x_TC), second(normal(rows, 3 * block, seed=seed)), block, 0.02, hadamard=inner)
    assert factor.matrix_KBB.dtype is torch.float32
    assert factor.matrix_KBB.is_contiguous()
    assert torch.equal(factor.matrix_KBB[0], torch.eye(block))
    assert_layer_stays((factor,), 3 * block, tolerance=1e-6)
