"""Triton: tokens through a block-diagonal matrix, then quantized. One program for a few tokens, which goes over their channels twice.

The first time it finds every token's range, the second time it makes codes: the products are cheap (blocks of 96 to 576 of thousands of channels)
beside writing the transformed tokens to memory and reading them back. Columns are worked on as two halves of the token, see `nibbles`, in pieces that
lie within a block each: of `UNIT`, what divides both a block and half a token.
"""

import triton
import triton.language as tl

from .triton_quantize import codes_of, grid_of, not_finite


@triton.jit
def _piece(x_rows, matrix_ptr, there, n, column, B: tl.constexpr, END: tl.constexpr, SHARED: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns column + n of the product, rounded to x's type, float32; n < END are within the block. x_rows: pointers to rows, of which some are
    there."""
    start = column // B * B
    w_ptr = matrix_ptr + (0 if SHARED else start * B) + column - start + n
    y = tl.zeros((x_rows.shape[0], n.shape[0]), dtype=tl.float32)
    for first in range(0, B, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load((x_rows + start)[:, None] + k[None, :], mask=there[:, None] & (k < B)[None, :], other=0.0)
        w = tl.load(w_ptr[None, :] + k[:, None] * B, mask=(k < B)[:, None] & (n < END)[None, :], other=0.0)
        y = tl.dot(x, w, y, input_precision="ieee")
    return y.to(x_rows.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def blocks_kernel(
    x_ptr,
    matrix_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    x_stride,
    clip,
    C: tl.constexpr,
    B: tl.constexpr,
    UNIT: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """matrix_ptr: (C / B, B, B), or one (B, B) for all blocks if SHARED, in x's type. C is even."""
    HALF: tl.constexpr = C // 2
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = m < rows
    x_rows = x_ptr + m.to(tl.int64) * x_stride
    high = tl.zeros((BLOCK_M,), dtype=tl.float32)
    low = tl.zeros((BLOCK_M,), dtype=tl.float32)
    bad = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for unit in range(0, HALF, UNIT):
        for first in range(0, UNIT, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            one = _piece(x_rows, matrix_ptr, there, n, unit, B, UNIT, SHARED, BLOCK_K)
            two = _piece(x_rows, matrix_ptr, there, n, unit + HALF, B, UNIT, SHARED, BLOCK_K)
            high = tl.maximum(high, tl.maximum(tl.max(one, 1), tl.max(two, 1)))
            low = tl.minimum(low, tl.minimum(tl.min(one, 1), tl.min(two, 1)))
            bad = tl.maximum(bad, tl.maximum(tl.max(not_finite(one), 1), tl.max(not_finite(two), 1)))
    scale, zero = grid_of(high, low, bad, clip, BITS, SYMMETRIC)
    tl.store(scale_ptr + m, scale, mask=there)
    if not SYMMETRIC:
        tl.store(zero_ptr + m, tl.where(zero == zero, zero, 0.0).to(tl.int32), mask=there)
    for unit in range(0, HALF, UNIT):
        for first in range(0, UNIT, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            one = _piece(x_rows, matrix_ptr, there, n, unit, B, UNIT, SHARED, BLOCK_K)
            two = _piece(x_rows, matrix_ptr, there, n, unit + HALF, B, UNIT, SHARED, BLOCK_K)
            code_one = codes_of(one, scale[:, None], zero[:, None], BITS, SYMMETRIC)
            code_two = codes_of(two, scale[:, None], zero[:, None], BITS, SYMMETRIC)
            inside = there[:, None] & (n < UNIT)[None, :]
            at = (unit + n)[None, :]
            if PACKED:
                tl.store(codes_ptr + m.to(tl.int64)[:, None] * HALF + at, (code_one & 15) | (code_two << 4), mask=inside)
            else:
                tl.store(codes_ptr + m.to(tl.int64)[:, None] * C + at, code_one, mask=inside)
                tl.store(codes_ptr + m.to(tl.int64)[:, None] * C + HALF + at, code_two, mask=inside)
