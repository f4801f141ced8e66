"""Hadamard matrices against SciPy's and against Paley's constructions written out; the fast product against the dense one."""

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.transforms.hadamard import hadamard, hadamard_block, rotate

WIDTHS = (
    *(13824, 14336, 28672, 5632, 8960, 18944, 29568, 27648, 9728, 4864, 17408, 12288),
    *(6144, 3072, 1536, 2560, 5120, 576, 960, 3584, 896, 6656, 17920, 11008),
)
"""Of known language models."""
ORDERS = tuple(order for order in range(4, 201, 4) if order not in (92, 116, 156, 172, 184, 188))
"""The multiples of 4 that Sylvester and Paley reach (a table in any textbook on designs)."""


def legendre(a: int, p: int) -> int:
    """The Legendre symbol by Euler's criterion."""
    power = pow(a % p, (p - 1) // 2, p)
    return power - p if power > 1 else power


def paley_by_symbols(p: int) -> Tensor:
    """Paley's matrix over the integers modulo the prime p, entry by entry: of the first kind if p = 3 mod 4, else of the second."""
    conference = [[0, *[1] * p]] + [[1 if p % 4 == 1 else -1, *[legendre(i - j, p) for j in range(p)]] for i in range(p)]
    if p % 4 == 3:
        return torch.tensor([[value + (i == j) for j, value in enumerate(row)] for i, row in enumerate(conference)], dtype=torch.float64)
    blocks = {0: [[1, -1], [-1, -1]], 1: [[1, 1], [1, -1]], -1: [[-1, -1], [-1, 1]]}
    return torch.tensor([[value for entry in row for value in blocks[entry][half]] for row in conference for half in (0, 1)], dtype=torch.float64)


def assert_hadamard(h: Tensor) -> None:
    n = len(h)
    assert torch.equal(h.abs(), torch.full((n, n), 1 / math.sqrt(n), dtype=h.dtype))
    torch.testing.assert_close(h @ h.T, torch.eye(n, dtype=h.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, 256])
def test_powers_of_2_are_sylvesters(n: int) -> None:
    torch.testing.assert_close(hadamard(n), torch.from_numpy(scipy.linalg.hadamard(n, dtype=float)) / math.sqrt(n), rtol=1e-15, atol=0)


@pytest.mark.parametrize("p", [11, 13, 17, 19, 37, 43, 59, 73, 107, 139])
def test_primes_are_paleys(p: int) -> None:
    matrix = paley_by_symbols(p)
    n = len(matrix)
    assert_hadamard(matrix / math.sqrt(n))
    if n != 28:  # of the first kind over 27 elements
        torch.testing.assert_close(hadamard(n), matrix / math.sqrt(n), rtol=1e-15, atol=0)


@pytest.mark.parametrize("n", ORDERS)
def test_orders(n: int) -> None:
    assert_hadamard(hadamard(n))
    assert hadamard_block(n) == n


@pytest.mark.parametrize("n", [28, 52, 100, 244, 344, 1332])
def test_prime_powers(n: int) -> None:
    """3^3 + 1, 2 (5^2 + 1), 2 (7^2 + 1), 3^5 + 1, 7^3 + 1, 11^3 + 1."""
    assert_hadamard(hadamard(n))


@pytest.mark.parametrize("n", WIDTHS)
def test_widths_of_models(n: int) -> None:
    """Some rows of the matrix: of modulus 1 / sqrt(n), orthonormal, and back where they came from."""
    rows = torch.linspace(0, n - 1, 12).long()
    unit_TC = torch.nn.functional.one_hot(rows, n).double()
    h_TC = rotate(unit_TC, n)
    torch.testing.assert_close(h_TC.abs(), torch.full_like(h_TC, 1 / math.sqrt(n)), rtol=1e-12, atol=0)
    torch.testing.assert_close(h_TC @ h_TC.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate(h_TC, inverse=True), unit_TC, rtol=0, atol=1e-12)


@given(
    n=st.sampled_from([1, 2, 12, 24, 36, 48, 96, 100, 144, 240, 344, 576, 1536]),
    inverse=st.booleans(),
    leading=st.sampled_from([(), (3,), (2, 0), (2, 3)]),
)
def test_rotate_is_the_dense_product(n: int, inverse: bool, leading: tuple[int, ...]) -> None:
    x = torch.randn(*leading, n, dtype=torch.float64)
    dense = hadamard(n).T if inverse else hadamard(n)
    torch.testing.assert_close(rotate(x, inverse=inverse), x @ dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "block"), [(48, 12), (48, 4), (15, 1), (7, None), (18, None), (172, None), (40, 20), (576, 64)])
def test_rotate_in_blocks(n: int, block: int | None) -> None:
    size = hadamard_block(n) if block is None else block
    x = torch.randn(5, n, dtype=torch.float64)
    dense = torch.block_diag(*[hadamard(size)] * (n // size))
    torch.testing.assert_close(rotate(x, block), x @ dense, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotate(x, block, inverse=True), x @ dense.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("n", "block"), [(1, 1), (2, 2), (6, 2), (7, 1), (14, 2), (172, 4), (92, 4), (232, 8), (372, 124), (11008, 11008)])
def test_largest_block(n: int, block: int) -> None:
    assert hadamard_block(n) == block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """Of 16 bits only the result is rounded, once: by a quarter of a step on average."""
    x = torch.randn(64, 960).to(dtype)
    before = x.clone()
    found, true = rotate(x), x.double() @ hadamard(960)
    assert found.dtype is dtype
    assert torch.equal(x, before)
    assert float((found.double() - true).norm() / true.norm()) < (0.25 if dtype.itemsize == 2 else 2) * torch.finfo(dtype).eps
    assert hadamard(20, dtype).dtype is dtype


def test_views_and_transposes_are_taken() -> None:
    w_OI = torch.randn(96, 24, dtype=torch.float64).T
    torch.testing.assert_close(rotate(w_OI), w_OI @ hadamard(96), rtol=0, atol=1e-13)


def test_a_layer_stays_the_same_and_its_spike_is_gone() -> None:
    x_TC, w_OC = torch.randn(32, 1536, dtype=torch.float64), torch.randn(16, 1536, dtype=torch.float64)
    x_TC[3, 700] = 3_000
    torch.testing.assert_close(rotate(x_TC) @ rotate(w_OC).T, x_TC @ w_OC.T, rtol=0, atol=1e-9)
    assert rotate(x_TC).abs().max() < 3_000 / math.sqrt(1536) + 5


def test_the_matrices_kept_are_not_handed_out() -> None:
    hadamard(12).zero_()
    rotate(torch.ones(12)).zero_()
    assert_hadamard(hadamard(12))


@pytest.mark.parametrize("n", [3, 6, 92, 172, 376])
def test_no_construction(n: int) -> None:
    with pytest.raises(PlanishError, match=f"no Hadamard matrix of width {n} .* in blocks of {hadamard_block(n)}"):
        hadamard(n)
    with pytest.raises(PlanishError, match=f"no Hadamard matrix of width {n}"):
        rotate(torch.ones(2, n), n)


@pytest.mark.parametrize("n", [0, -4])
def test_no_width(n: int) -> None:
    for refused in (lambda: hadamard(n), lambda: hadamard_block(n), lambda: rotate(torch.ones(2, 0))):
        with pytest.raises(PlanishError, match="at least 1"):
            refused()


@pytest.mark.parametrize("block", [0, -4, 16, 48])
def test_blocks_divide(block: int) -> None:
    with pytest.raises(PlanishError, match=f"24 cannot be rotated in blocks of {block}. .* example 24"):
        rotate(torch.ones(2, 24), block)
