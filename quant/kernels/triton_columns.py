"""Triton: a block of a weight's columns rounded one after the other, as gptq.Columns does, in one launch instead of a dozen a column.

One program for some rows, a thread for each of them: rows are independent. The deviations of the block's columns are in registers, and each column
collects from there what those before it owe it. Launches switch the fusing of multiply and add off, so that all but the order of sums is torch's.
"""

import triton
import triton.language as tl

from .triton_quantize import rounded


@triton.jit
def columns_kernel(
    weights_ptr,
    original_ptr,
    deviations_ptr,
    codes_ptr,
    shares_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    shares_stride,
    scale_stride,
    zero_stride,
    count: tl.constexpr,
    ZERO: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Pointers to the block's first column; of shares to its place on the diagonal. rows: of the weight, so many lie in a column. count:
    columns, COLUMNS at most; a constant, for a model has few. scale_stride, zero_stride: from one column's grid to the next one's."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = r < rows
    j = tl.arange(0, COLUMNS)
    at = r.to(tl.int64)
    scale_at = r.to(tl.int64)
    zero_at = r.to(tl.int64)
    share_at = j.to(tl.int64)
    deviations = tl.zeros((COLUMNS, BLOCK_R), dtype=tl.float32)
    for k in range(0, count):
        w = tl.load(weights_ptr + at, mask=there, other=0.0)
        share = tl.load(shares_ptr + share_at, mask=j < k, other=0.0)
        w += tl.sum(share[:, None] * deviations, 0)
        scale = tl.load(scale_ptr + scale_at, mask=there, other=1.0)
        zero = tl.zeros((BLOCK_R,), dtype=tl.float32)
        if ZERO:
            zero = tl.load(zero_ptr + zero_at, mask=there, other=0.0)
        code = rounded(tl.div_rn(w, scale) + zero, BITS)
        deviation = tl.load(original_ptr + at, mask=there, other=0.0) - (code - zero) * scale
        tl.store(codes_ptr + at, code.to(tl.int32).to(tl.int8), mask=there)
        tl.store(deviations_ptr + at, deviation, mask=there)
        deviations = tl.where((j == k)[:, None], deviation[None, :], deviations)
        at += rows
        scale_at += scale_stride
        zero_at += zero_stride
        share_at += shares_stride
