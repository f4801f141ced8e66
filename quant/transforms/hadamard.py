"""Hadamard matrices of any width that Sylvester's and Paley's constructions give, and the fast product with them.

H_n = (P_1 ⊗ ... ⊗ S ⊗ P_k) / sqrt(n). S: Sylvester's matrix, of a power of 2. P_i: Paley's (R. E. A. C. Paley, "On orthogonal matrices",
1933), over the field of q elements, with Q_ij = chi(a_i - a_j), where chi is 1 for squares, -1 for the others and 0 for 0:
I, q = 3 mod 4, order q + 1: I + [[0, 1'], [-1, Q]];
II, q = 1 mod 4, order 2 (q + 1): [[0, 1'], [1, Q]] ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]].
All are computed, those of prime powers too (344 = 7^3 + 1, so 11008 = 344 * 32). Of the ways to compose a width, the one whose Paley orders have
the smallest sum is taken: the same one always, for weights may be stored in its basis.

What they are for: every value of x H is a sum, with signs, of all channels, so no channel sticks out any more (QuaRot, Ashkboos et al. 2024,
arXiv:2404.00456).

Shape suffixes: n width, A and B the Kronecker factors of a width, q elements of a field, k digits of an element, T rows.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import PlanishError


def hadamard(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthonormal H_n: (n, n), every entry 1 or -1 over sqrt(n). Not symmetric in general.

    Equivalent to scipy.linalg.hadamard(n) / sqrt(n) where n is a power of 2. Raises PlanishError where there is no construction.
    """
    return (_signs(_factors(n)) / math.sqrt(n)).to(dtype)


@lru_cache(maxsize=256)
def hadamard_block(n: int) -> int:
    """The largest divisor of n, n itself if possible, that has a Hadamard matrix: the size of the blocks in which a width of n can be rotated.

    1 if n is odd. Raises PlanishError if n is not positive.
    """
    if n < 1:
        raise PlanishError(f"A width of {n} cannot be rotated, a width is at least 1.")
    return next(block for block in range(n, 0, -1) if n % block == 0 and _paley_orders(block) is not None)


def rotate(x: Tensor, block: int | None = None, *, inverse: bool = False) -> Tensor:
    """x: (..., n) times H, or times its transpose if inverse. In x's dtype, computed in float32 or wider (at the precision torch is set to).

    H is block-diagonal, each block hadamard(block); block None: hadamard_block(n). Equivalent to
    x @ torch.block_diag(*[hadamard(block)] * (n // block)), but two products with factors of about sqrt(block).
    A layer stays the same when its input and its weight (O, n) are both rotated. PlanishError if block does not divide n or has no construction.
    """
    n = x.shape[-1]
    size = hadamard_block(n) if block is None else block
    if size < 1 or n % size:
        raise PlanishError(f"A width of {n} cannot be rotated in blocks of {size}. Choose a divisor, for example {hadamard_block(n)}.")
    dtype = torch.promote_types(x.dtype, torch.float32)
    left_AA, right_BB = _halves(size, dtype, x.device)
    if inverse:
        left_AA, right_BB = left_AA.T, right_BB.T
    y_TB = x.to(dtype).reshape(-1, len(right_BB)) @ right_BB
    if len(left_AA) > 1:
        y_TB = left_AA.T @ y_TB.view(-1, len(left_AA), len(right_BB))
    return y_TB.reshape(x.shape).to(x.dtype)


def kronecker_signs(n: int) -> tuple[Tensor, Tensor]:
    """H_n sqrt(n) as a Kronecker product of two factors of 1 and -1, (A, A) and (B, B) in float64, of sizes as near as can be.

    A kernel's operands: the x (..., n) of `rotate` is X (A, B), and x H is left' X right / sqrt(n).
    """
    factors = _factors(n)
    cut = min(range(len(factors) + 1), key=lambda i: math.prod(factors[:i]) + math.prod(factors[i:]))
    return _signs(factors[:cut]), _signs(factors[cut:])


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _halves(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same factors, orthonormal, kept where they are used: nothing is copied there for every input."""
    left_AA, right_BB = ((signs / math.sqrt(len(signs))).to(device, dtype) for signs in kronecker_signs(n))
    return left_AA, right_BB


def _factors(n: int) -> tuple[int, ...]:
    """The orders whose Kronecker product is H_n: Paley's, and 2 as often as needed, before the last of them: so most widths can be halved well."""
    block = hadamard_block(n)
    orders = _paley_orders(n)
    if orders is None:
        raise PlanishError(
            f"There is no Hadamard matrix of width {n} by the constructions of Sylvester and Paley. Use a block-diagonal one, in blocks of {block}."
        )
    return (*orders[:-1], *[2] * ((n // math.prod(orders)).bit_length() - 1), *orders[-1:])


@lru_cache(maxsize=4096)
def _paley_orders(n: int, least: int = 12) -> tuple[int, ...] | None:
    """Paley's orders, rising from `least`, whose product is n but for a power of 2, with the smallest sum. None if there are none."""
    if n & (n - 1) == 0:
        return ()
    ways = []
    for order in range(least, n + 1, 4):
        if n % order == 0 and order & (order - 1) and _field_of(order) is not None:
            rest = _paley_orders(n // order, order)
            if rest is not None:
                ways.append((order, *rest))
    return min(ways, key=lambda orders: (sum(orders), orders), default=None)


def _field_of(order: int) -> tuple[int, int] | None:
    """(p, k) of the field of q = p^k elements that gives this order, a multiple of 4; None if none does."""
    if (order - 1) % 4 == 3 and (field := _prime_power(order - 1)):
        return field
    return _prime_power(order // 2 - 1) if (order // 2 - 1) % 4 == 1 else None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, p an odd prime; None if there are none."""
    p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
    k = round(math.log(q, p)) if p > 2 else 0
    return (p, k) if q % 2 and k and p**k == q else None


def _signs(orders: tuple[int, ...]) -> Tensor:
    """The Kronecker product of the matrices of these orders: entries 1 and -1 in float64."""
    product = torch.ones(1, 1, dtype=torch.float64)
    for order in orders:
        product = torch.kron(product, torch.tensor([[1, 1], [1, -1]], dtype=torch.float64) if order == 2 else _paley(order))
    return product


def _paley(order: int) -> Tensor:
    """Paley's matrix of this order, entries 1 and -1 in float64: of the first kind where that exists, else of the second."""
    field = _field_of(order)
    assert field is not None
    p, k = field
    q = p**k
    second = order != q + 1
    core = torch.ones(q + 1, q + 1, dtype=torch.float64)
    core[0, 0] = 0
    core[1:, 0] = 1 if second else -1
    core[1:, 1:] = _character_of_differences(p, k)
    eye = torch.eye(q + 1, dtype=torch.float64)
    if not second:
        return core + eye
    return torch.kron(core, core.new_tensor([[1, 1], [1, -1]])) + torch.kron(eye, core.new_tensor([[1, -1], [-1, -1]]))


def _character_of_differences(p: int, k: int) -> Tensor:
    """chi(a_i - a_j) over the field of q = p^k elements: (q, q) float64. Element number i has the digits of i in base p as its coefficients."""
    powers_k = p ** torch.arange(k)
    digits_qk = torch.arange(p**k)[:, None] // powers_k % p
    chi_q = torch.full((p**k,), -1.0, dtype=torch.float64)
    chi_q[_squares(digits_qk, powers_k, p)] = 1
    chi_q[0] = 0
    differences_qq = sum((digits_qk[:, None, i] - digits_qk[None, :, i]) % p * p**i for i in range(k))
    assert isinstance(differences_qq, Tensor)
    return chi_q[differences_qq]


def _squares(digits_qk: Tensor, powers_k: Tensor, p: int) -> Tensor:
    """Which elements are squares, 0 among them: (q,) bool.

    Elements are polynomials modulo x^k - r(x), and the first r with which they are a field is taken: only there are (q + 1) / 2 of them squares.
    """
    q, k = digits_qk.shape
    product_qd = torch.zeros(q, 2 * k - 1, dtype=torch.int64)
    for i in range(k):
        product_qd[:, i : i + k] += digits_qk[:, i, None] * digits_qk
    for r_k in digits_qk:
        reduced_qd = product_qd.clone()
        for d in range(2 * k - 2, k - 1, -1):
            reduced_qd[:, d - k : d] += reduced_qd[:, d, None] % p * r_k
        square_q = torch.zeros(q, dtype=torch.bool)
        square_q[reduced_qd[:, :k] % p @ powers_k] = True
        if int(square_q.sum()) == (q + 1) // 2:
            return square_q
    raise AssertionError(f"no polynomial of degree {k} is irreducible modulo {p}")
