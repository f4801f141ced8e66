"""Triton: the linear operators. Weights are loaded as they lie, (BLOCK_N, BLOCK_K), and transposed in the product, never in memory.

Packed weights are the left factor, so that what is unpacked goes to the tensor cores from registers; the sum is transposed once, at the end. A
nibble is multiplied as 16 times its code and the exact integer sum shifted back. The two nibbles of a byte lie half a row apart (`nibbles`), hence
two products a step, with two pieces of the input.

Sums are int32: exact up to 131071 inputs. Shape suffixes as in `schemas`.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile: GROUP tiles of rows at a time share the weight's tiles in the cache."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    first = pid // (GROUP * tiles_n) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    within = pid % (GROUP * tiles_n)
    return first + within % size, within // size


@triton.jit
def _load(ptr, row, k, rows, end, stride):
    """A (rows, k) piece in bounds, 0 beyond them."""
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + k[None, :], mask=(row < rows)[:, None] & (k < end)[None, :], other=0)


@triton.jit
def _scaled(sums, m, n, rows, columns, x_scale_ptr, x_zero_ptr, w_scale_ptr, w_sum_ptr, scale_stride, ZERO: tl.constexpr):
    """The integer sums of codes as float32 products."""
    in_m = m < rows
    in_n = n < columns
    if ZERO:
        w_sum = tl.load(w_sum_ptr + n, mask=in_n, other=0)
        sums -= tl.load(x_zero_ptr + m * scale_stride, mask=in_m, other=0)[:, None] * w_sum[None, :]
    y = sums.to(tl.float32) * tl.load(x_scale_ptr + m * scale_stride, mask=in_m, other=0.0)[:, None]
    return y * tl.load(w_scale_ptr + n, mask=in_n, other=0.0)[None, :]


@triton.jit
def _beside(y, m, n, rows, columns, low_ptr, up_ptr, rank: tl.constexpr, BLOCK_R: tl.constexpr):
    """y + low up'."""
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        low = _load(low_ptr, m, r, rows, rank, rank)
        up = _load(up_ptr, n, r, columns, rank, rank)
        y = tl.dot(low, tl.trans(up), y, input_precision="ieee")
    return y


@triton.jit(do_not_specialize=["rows"])
def integer_kernel(
    x_ptr,
    x_scale_ptr,
    x_zero_ptr,
    w_ptr,
    w_scale_ptr,
    w_sum_ptr,
    bias_ptr,
    low_ptr,
    up_ptr,
    y_ptr,
    rows,
    columns,
    x_stride,
    w_stride,
    scale_stride,
    steps: tl.constexpr,
    rank: tl.constexpr,
    X_PACKED: tl.constexpr,
    W_PACKED: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """steps: bytes in a row of the weight, a constant: a model has few. scale_stride: 1, or 0 if one scale and zero point serve all tokens."""
    tile_m, tile_n = _tile(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_N, BLOCK_M) if W_PACKED else (BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, steps, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = _load(w_ptr, n, k, columns, steps, w_stride)
        x = _load(x_ptr, m, k, rows, steps, x_stride)
        if W_PACKED:
            x_low = (x << 4).to(tl.int8) if X_PACKED else x
            x_high = (x & -16).to(tl.int8) if X_PACKED else _load(x_ptr + steps, m, k, rows, steps, x_stride)
            sums = tl.dot((w << 4).to(tl.int8), tl.trans(x_low), sums, out_dtype=tl.int32)
            sums = tl.dot((w & -16).to(tl.int8), tl.trans(x_high), sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(x, tl.trans(w), sums, out_dtype=tl.int32)
    if W_PACKED:
        sums = tl.trans(sums) >> 4
    if X_PACKED:
        sums = sums >> 4
    in_n = n < columns
    y = _scaled(sums, m, n, rows, columns, x_scale_ptr, x_zero_ptr, w_scale_ptr, w_sum_ptr, scale_stride, ZERO)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if SIDE:
        y = _beside(y, m, n, rows, columns, low_ptr, up_ptr, rank, BLOCK_R)
    at = m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(m < rows)[:, None] & in_n[None, :])


@triton.jit
def nibble_value(nibble):
    """float32 value of a two's complement nibble in the low 4 bits of an int16: float16 0x6400 + u is 1024 + u."""
    biased = ((nibble & 15) ^ 8) | 0x6400
    return biased.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) - 1032.0


@triton.jit
def _dequantized(nibble, scale_ptr, zero_ptr, n, first, k, columns, end, groups, SIZE: tl.constexpr, ZERO: tl.constexpr, UNIFORM: tl.constexpr):
    """(code - zero) * scale, float32. UNIFORM: all of k, from `first` on, lie in one group."""
    value = nibble_value(nibble)
    if UNIFORM:
        scale = tl.load(scale_ptr + first // SIZE + n * groups, mask=n < columns, other=0.0)[:, None]
        if ZERO:
            value -= tl.load(zero_ptr + first // SIZE + n * groups, mask=n < columns, other=0.0)[:, None]
    else:
        grid = n[:, None] * groups + (k // SIZE)[None, :]
        inside = (n < columns)[:, None] & (k < end)[None, :]
        scale = tl.load(scale_ptr + grid, mask=inside, other=0.0)
        if ZERO:
            value -= tl.load(zero_ptr + grid, mask=inside, other=0.0)
    return value * scale


@triton.jit(do_not_specialize=["rows"])
def weight_only_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    rows,
    columns,
    x_stride,
    groups,
    steps: tl.constexpr,
    SIZE: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    UNIFORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """x times a packed weight, dequantized and rounded to x's type. SIZE: codes in a group. scale, zero: float32 (columns, groups)."""
    tile_m, tile_n = _tile(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, steps, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = _load(w_ptr, n, k, columns, steps, steps).to(tl.int16)
        inside = (m < rows)[:, None] & (k < steps)[None, :]
        x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :]
        low = _dequantized(w, scale_ptr, zero_ptr, n, start, k, columns, steps, groups, SIZE, ZERO, UNIFORM).to(dtype)
        sums = tl.dot(low, tl.trans(tl.load(x_at, mask=inside, other=0.0)), sums, input_precision="ieee")
        high = _dequantized(w >> 4, scale_ptr, zero_ptr, n, steps + start, steps + k, columns, 2 * steps, groups, SIZE, ZERO, UNIFORM).to(dtype)
        sums = tl.dot(high, tl.trans(tl.load(x_at + steps, mask=inside, other=0.0)), sums, input_precision="ieee")
    y = tl.trans(sums)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])
