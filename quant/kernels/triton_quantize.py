"""Triton: dynamic quantization of every token, alone or after RMSNorm or silu(gate) * up. One program a token, one pass over it.

A row is worked on as its two halves, the second one masked where the width is odd: so packed codes need no shuffle, see `nibbles`. The arithmetic
is that of formats.scale_and_zero and formats.to_codes, division and rounding included; launches switch the fusing of multiply and add off for it.
"""

import triton
import triton.language as tl

_TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away, it rounds to integers, halves to even


@triton.jit
def grid_of(high, low, bad, clip, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale and zero point, float32, that cover clip * low to clip * high; NaN if `bad`."""
    top = tl.maximum(high, 0.0) * clip
    bottom = tl.minimum(low, 0.0) * clip
    span = tl.maximum(-bottom, top) if SYMMETRIC else top - bottom
    scale = tl.div_rn(span, (2 ** (BITS - 1) - 1 if SYMMETRIC else 2**BITS - 1) * 1.0)
    scale = tl.where(scale < _TINY, 1.0, scale)
    scale = tl.where(bad != 0, float("nan"), scale)
    zero = -(2 ** (BITS - 1)) * 1.0 - tl.div_rn(bottom, scale)
    return scale, rounded(zero, BITS)


@triton.jit
def rounded(y, BITS: tl.constexpr):
    """y as the nearest code, still float32."""
    y = tl.minimum(tl.maximum(y, -(2 ** (BITS - 1)) * 1.0), (2 ** (BITS - 1) - 1) * 1.0)
    return (y + _ROUND) - _ROUND


@triton.jit
def codes_of(x, scale, zero, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """int8 codes of x on a grid that broadcasts against it."""
    y = tl.div_rn(x, scale)
    if not SYMMETRIC:
        y = y + zero
    return tl.where(y == y, rounded(y, BITS), 0.0).to(tl.int32).to(tl.int8)  # 0 for NaN


@triton.jit
def not_finite(x):
    """1 where x is NaN or Inf."""
    return tl.where(tl.abs(x) < float("inf"), 0, 1)


@triton.jit
def quantize_kernel(
    x_ptr,
    other_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    width,
    x_stride,
    other_stride,
    eps,
    clip,
    PRODUCER: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """PRODUCER 0: x itself; 1: RMSNorm of x, other its weight; 2: silu(x) * other."""
    row = tl.program_id(0).to(tl.int64)
    half = (width + 1) // 2
    at = tl.arange(0, BLOCK)
    in_lo = at < half
    in_hi = at + half < width
    lo_in = tl.load(x_ptr + row * x_stride + at, mask=in_lo, other=0.0)
    hi_in = tl.load(x_ptr + row * x_stride + half + at, mask=in_hi, other=0.0)
    lo = lo_in.to(tl.float32)
    hi = hi_in.to(tl.float32)
    if PRODUCER == 1:
        square = tl.sum(lo * lo, 0) + tl.sum(hi * hi, 0)
        factor = tl.rsqrt(square / width + eps)
        weight_lo = tl.load(other_ptr + at, mask=in_lo, other=0.0).to(tl.float32)
        weight_hi = tl.load(other_ptr + half + at, mask=in_hi, other=0.0).to(tl.float32)
        lo = ((lo * factor).to(lo_in.dtype).to(tl.float32) * weight_lo).to(lo_in.dtype).to(tl.float32)
        hi = ((hi * factor).to(hi_in.dtype).to(tl.float32) * weight_hi).to(hi_in.dtype).to(tl.float32)
    if PRODUCER == 2:
        other_lo = tl.load(other_ptr + row * other_stride + at, mask=in_lo, other=0.0).to(tl.float32)
        other_hi = tl.load(other_ptr + row * other_stride + half + at, mask=in_hi, other=0.0).to(tl.float32)
        lo = ((lo / (1.0 + tl.exp(-lo))).to(lo_in.dtype).to(tl.float32) * other_lo).to(lo_in.dtype).to(tl.float32)
        hi = ((hi / (1.0 + tl.exp(-hi))).to(hi_in.dtype).to(tl.float32) * other_hi).to(hi_in.dtype).to(tl.float32)
    high = tl.maximum(tl.max(lo, 0), tl.max(hi, 0))
    low = tl.minimum(tl.min(lo, 0), tl.min(hi, 0))
    bad = tl.maximum(tl.max(not_finite(lo), 0), tl.max(not_finite(hi), 0))
    scale, zero = grid_of(high, low, bad, clip, BITS, SYMMETRIC)
    tl.store(scale_ptr + row, scale)
    if not SYMMETRIC:
        tl.store(zero_ptr + row, tl.where(zero == zero, zero, 0.0).to(tl.int32))
    code_lo = codes_of(lo, scale, zero, BITS, SYMMETRIC)
    code_hi = codes_of(hi, scale, zero, BITS, SYMMETRIC)
    if PACKED:
        tl.store(codes_ptr + row * half + at, (code_lo & 15) | (code_hi << 4), mask=in_lo)
    else:
        tl.store(codes_ptr + row * width + at, code_lo, mask=in_lo)
        tl.store(codes_ptr + row * width + half + at, code_hi, mask=in_hi)
