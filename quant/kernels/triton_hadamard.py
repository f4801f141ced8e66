"""Triton: a token through an online Hadamard rotation, then quantized. One program a token.

With x as X (A, B) and H = (left ⊗ right) / sqrt(n), the rotated token is left' X right / sqrt(n). Both matrices hold 1 and -1, exact in 16 bits, so
that the first product is exact but for its float32 sums; what it gives is split in a 16-bit part and the 16-bit rest for the second product, which
keeps 16 of its bits or more. Blocks: left is the Kronecker product of a unit matrix with a block's. A is even: the second product is done for the
first and the second half of the result's rows, the two halves of the token, see `nibbles`.
"""

import triton
import triton.language as tl

from .triton_quantize import codes_of, grid_of, not_finite


@triton.jit
def _right_product(
    x_ptr,
    signs_ptr,
    right_ptr,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIGNS: tl.constexpr,
):
    a = tl.arange(0, BLOCK_A)
    b = tl.arange(0, BLOCK_B)
    y = tl.zeros((BLOCK_A, BLOCK_B), dtype=tl.float32)
    for start in range(0, B, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (a < A)[:, None] & (k < B)[None, :]
        x = tl.load(x_ptr + a[:, None] * B + k[None, :], mask=inside, other=0.0)
        if SIGNS:
            x = x * tl.load(signs_ptr + a[:, None] * B + k[None, :], mask=inside, other=0.0).to(x.dtype)
        right = tl.load(right_ptr + k[:, None] * B + b[None, :], mask=(k < B)[:, None] & (b < B)[None, :], other=0.0)
        y = tl.dot(x, right, y, input_precision="ieee")
    return y


@triton.jit
def _left_product(left_ptr, row0, y, fine, A, HALF_A: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr):
    m = tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_A)
    left = tl.load(left_ptr + (row0 + m)[:, None] * A + k[None, :], mask=(m < HALF_A)[:, None] & (k < A)[None, :], other=0.0)
    if SPLIT:
        return tl.dot(left, y) + tl.dot(left, fine)
    return tl.dot(left, y, input_precision="ieee")


@triton.jit
def hadamard_kernel(
    x_ptr,
    signs_ptr,
    left_ptr,
    right_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    x_stride,
    factor,
    clip,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIGNS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PACKED: tl.constexpr,
):
    """left_ptr: left' (A, A), right_ptr: right (B, B), both in x's type. factor: 1 / sqrt(the size of a block)."""
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCK_B)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    split: tl.constexpr = dtype != tl.float32
    y = _right_product(x_ptr + row * x_stride, signs_ptr, right_ptr, A, B, BLOCK_A, BLOCK_B, BLOCK_K, SIGNS)
    HALF_A: tl.constexpr = A // 2
    if split:
        coarse = y.to(tl.bfloat16)  # the range of float32, which sums of float16 need
        fine = (y - coarse.to(tl.float32)).to(tl.bfloat16)
        lo = _left_product(left_ptr, 0, coarse, fine, A, HALF_A, BLOCK_A, BLOCK_H, True)
        hi = _left_product(left_ptr, HALF_A, coarse, fine, A, HALF_A, BLOCK_A, BLOCK_H, True)
    else:
        lo = _left_product(left_ptr, 0, y, y, A, HALF_A, BLOCK_A, BLOCK_H, False)
        hi = _left_product(left_ptr, HALF_A, y, y, A, HALF_A, BLOCK_A, BLOCK_H, False)
    lo = (lo * factor).to(dtype).to(tl.float32)
    hi = (hi * factor).to(dtype).to(tl.float32)
    high = tl.maximum(tl.max(lo), tl.max(hi))
    low = tl.minimum(tl.min(lo), tl.min(hi))
    bad = tl.maximum(tl.max(not_finite(lo)), tl.max(not_finite(hi)))
    scale, zero = grid_of(high, low, bad, clip, BITS, SYMMETRIC)
    tl.store(scale_ptr + row, scale)
    if not SYMMETRIC:
        tl.store(zero_ptr + row, tl.where(zero == zero, zero, 0.0).to(tl.int32))
    code_lo = codes_of(lo, scale, zero, BITS, SYMMETRIC)
    code_hi = codes_of(hi, scale, zero, BITS, SYMMETRIC)
    m = tl.arange(0, BLOCK_H)
    at = m[:, None] * B + b[None, :]
    inside_half = (m < HALF_A)[:, None] & (b < B)[None, :]
    if PACKED:
        tl.store(codes_ptr + row * (HALF_A * B) + at, (code_lo & 15) | (code_hi << 4), mask=inside_half)
    else:
        tl.store(codes_ptr + row * (A * B) + at, code_lo, mask=inside_half)
        tl.store(codes_ptr + row * (A * B) + HALF_A * B + at, code_hi, mask=inside_half)
