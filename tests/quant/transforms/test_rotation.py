"""Random rotations: orthogonal, uniform, the same for the same seed."""

import pytest
import torch
from helpers_transforms import assert_layer_stays, normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.quant.transforms.factors import Hadamard
from planish.quant.transforms.hadamard import hadamard, hadamard_block
from planish.quant.transforms.rotation import orthonormal, random_orthogonal, random_signs


def gram_schmidt(matrix_nn: Tensor) -> Tensor:
    """Column by column, textbook: what QR with a positive diagonal is."""
    columns: list[Tensor] = []
    for column in matrix_nn.T:
        for done in columns:
            column = column - (column @ done) * done
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


@given(st.integers(1, 20), st.integers(0, 999))
def test_orthonormal_is_gram_schmidt(n: int, seed: int) -> None:
    Q_nn = random_orthogonal(n, seed)
    assert Q_nn.dtype is torch.float64
    torch.testing.assert_close(Q_nn @ Q_nn.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(orthonormal(Q_nn), Q_nn, rtol=0, atol=1e-13)
    matrix_nn = normal(n, n, seed=seed) + 3 * torch.eye(n)
    torch.testing.assert_close(orthonormal(matrix_nn), gram_schmidt(matrix_nn), rtol=0, atol=1e-7)


def test_haar_is_uniform() -> None:
    """The trace's mean is 0 and its mean square 1 (Diaconis and Shahshahani 1994)."""
    traces = torch.stack([random_orthogonal(4, seed).trace() for seed in range(2000)])
    assert abs(float(traces.mean())) < 0.1
    assert float(traces.square().mean()) == pytest.approx(1, abs=0.15)


def test_signs() -> None:
    signs_C = random_signs(10_000, 1)
    assert signs_C.dtype is torch.float32
    assert set(signs_C.tolist()) == {1.0, -1.0}
    assert abs(float(signs_C.mean())) < 0.05
    assert torch.equal(signs_C, random_signs(10_000, 1))
    assert not torch.equal(signs_C, random_signs(10_000, 2))
    assert torch.equal(random_orthogonal(5, 1), random_orthogonal(5, 1))
    assert random_signs(0, 0).shape == (0,)


@pytest.mark.parametrize("n", [1, 7, 12, 18, 172])
def test_a_hadamard_with_signs(n: int) -> None:
    size = hadamard_block(n)
    factor = Hadamard(size, random_signs(n, 3))
    T_CC = torch.diag(random_signs(n, 3).double()) @ torch.block_diag(*[hadamard(size)] * (n // size))
    x_TC = normal(4, n)
    torch.testing.assert_close(factor.on_input(x_TC), x_TC @ T_CC, rtol=0, atol=1e-12)
    assert_layer_stays((factor,), n)


def test_signs_keep_a_shared_sum_from_adding_up() -> None:
    x_C = torch.ones(1024, dtype=torch.float64)
    assert float(Hadamard(1024, random_signs(1024, 0)).on_input(x_C).abs().max()) < 5
