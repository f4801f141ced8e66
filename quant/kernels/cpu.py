"""The operators on a CPU, in torch's own and, where there is a compiler, in passes of native.cpp: what each computes is defined in `schemas`.

Integer products are oneDNN's where the processor has instructions for them (AMX, VNNI): exact, and about twice as fast as bfloat16's where the weight
is laid out for them, see `prepack` and `cpu_layout`. Elsewhere they are float32's, which hold the sums of 1024 products exactly: oneDNN adds
pairs of products in 16 bits there, which overflow, and torch._int_mm takes sixty times as long.

Shape suffixes: T tokens, C = I in channels, O out channels, G groups, R rank.
"""

import os
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..formats import LEAST_SCALE, by_group, code_range
from ..pieces import pieces
from ..transforms.factors import Blocks, Hadamard
from . import native
from .nibbles import pack_nibbles, unpack_nibbles
from .schemas import LIBRARY

Codes = tuple[Tensor, Tensor, Tensor]
_FP8_MAX = 448.0
_LEAST_PRODUCT = 512  # results; for fewer oneDNN takes its reference implementation, a hundred times slower
_HELD = 1 << 10  # products of two bytes whose sum float32 holds exactly
_WIDENED = 1 << 20  # weights that are floats at a time, which stay in the processor's cache
_WORST = 64
FEW = 32  # tokens up to which weight-only codes are decoded as they are multiplied; beyond, dequantizing once costs less
LEAST = min(torch.finfo(torch.float32).tiny, LEAST_SCALE)


def cpu_layout(weight_OI: Tensor) -> Tensor:
    """The same (O, I) weight with the strides of a transposed (I, O) one, which torch._int_mm takes without copying."""
    return weight_OI.T.contiguous().T


def quantize_per_token(x: Tensor, bits: int, symmetric: bool, clip: float, packed: bool) -> Codes:
    """Codes of x_TC; see `schemas`."""
    if (found := native.quantize(x, grid(bits, symmetric, clip))) is not None:
        return _nibbles(found, packed)
    if not len(x) or torch.compiler.is_compiling():
        return _quantize(x, bits, symmetric, clip, packed)
    parts = [_quantize(x[rows], bits, symmetric, clip, packed) for rows in pieces(x)]
    codes, scale, zero = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, scale, zero


def _nibbles(codes: Codes, packed: bool) -> Codes:
    return (pack_nibbles(codes[0]), *codes[1:]) if packed else codes


def _quantize(x_TC: Tensor, bits: int, symmetric: bool, clip: float, packed: bool) -> Codes:
    y_TC = x_TC.to(torch.float32, copy=True)  # the extremes are found several times faster in float32 than in 16 bits
    scale_T1, zero_T1 = _grid(y_TC, bits, symmetric, clip)
    y_TC.div_(scale_T1)
    if zero_T1 is not None:
        y_TC.add_(zero_T1)
    y_TC.round_()
    if clip < 1 or not symmetric:  # a symmetric grid that covers the whole range has no code beyond its ends
        y_TC.clamp_(*code_range(bits))
    codes_TC = y_TC.to(torch.int8)
    zero = x_TC.new_empty((0, 1), dtype=torch.int32) if zero_T1 is None else zero_T1.to(torch.int32)
    return pack_nibbles(codes_TC) if packed else codes_TC, scale_T1, zero


def _grid(x_TC: Tensor, bits: int, symmetric: bool, clip: float) -> tuple[Tensor, Tensor | None]:
    """As formats.scale_and_zero with fewer passes; NaN in the scale of a token that is not finite."""
    qmin, qmax = code_range(bits)
    low_T1, high_T1 = x_TC.amin(1, keepdim=True) * clip, x_TC.amax(1, keepdim=True) * clip
    if symmetric:
        scale_T1 = torch.maximum(-low_T1, high_T1) / qmax
    else:
        low_T1, high_T1 = low_T1.clamp(max=0), high_T1.clamp(min=0)
        scale_T1 = (high_T1 - low_T1) / (qmax - qmin)
    scale_T1 = torch.where(scale_T1 < LEAST, 1.0, scale_T1)
    scale_T1 = torch.where(scale_T1 == torch.inf, torch.nan, scale_T1)
    return scale_T1, None if symmetric else (qmin - low_T1 / scale_T1).round_().clamp_(qmin, qmax)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, bits: int, symmetric: bool, clip: float, packed: bool) -> Codes:
    """Codes of x_TC / sqrt(mean(x²) + eps) * weight_C."""
    if (codes := native.rms_norm_quantize(x, weight, eps, grid(bits, symmetric, clip))) is not None:
        return _nibbles(codes, packed)
    wide_TC = x.float()
    normal_TC = (wide_TC * torch.rsqrt(wide_TC.square().mean(1, keepdim=True) + eps)).to(x.dtype)
    return quantize_per_token((weight * normal_TC).to(x.dtype), bits, symmetric, clip, packed)


def silu_mul_quantize(gate: Tensor, up: Tensor, bits: int, symmetric: bool, clip: float, packed: bool) -> Codes:
    """Codes of silu(gate_TC) * up_TC."""
    if (codes := native.silu_mul_quantize(gate, up, grid(bits, symmetric, clip))) is not None:
        return _nibbles(codes, packed)
    return quantize_per_token(torch.nn.functional.silu(gate).mul_(up), bits, symmetric, clip, packed)


def hadamard_quantize(x: Tensor, signs: Tensor | None, block: int, bits: int, symmetric: bool, clip: float, packed: bool) -> Codes:
    """Codes of (x_TC * signs_C) H, H block-diagonal; see factors.Hadamard."""
    return quantize_per_token(Hadamard(block, signs).on_input(x), bits, symmetric, clip, packed)


def blocks_quantize(x: Tensor, matrix: Tensor, bits: int, symmetric: bool, clip: float, packed: bool) -> Codes:
    """Codes of x_TC times the block-diagonal matrix_KBB; see factors.Blocks."""
    return quantize_per_token(Blocks(matrix).on_input(x), bits, symmetric, clip, packed)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x_TC as float8_e4m3fn with a scale for every token: its largest value becomes 448."""
    scale_T1 = x.abs().amax(1, keepdim=True).float() / _FP8_MAX
    scale_T1 = torch.where(scale_T1 < LEAST, 1.0, scale_T1)
    scale_T1 = torch.where(scale_T1 == torch.inf, torch.nan, scale_T1)
    return (x.float() / scale_T1).clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn), scale_T1


def linear_w8a8(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    w_sum: Tensor | None,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Codes times codes, one a byte each; see `schemas`. weight: strided, or as `prepack` laid it out."""
    if weight.is_mkldnn:
        y_TO = _prepacked(x, weight, w_scale)
        if low is None:
            sums_O = w_sum * w_scale if x_zero is not None and w_sum is not None else None
            if (finished := native.finish(y_TO, x_scale, x_zero, sums_O, bias, dtype)) is not None:
                return finished
        if x_zero is not None:
            assert w_sum is not None
            y_TO.addcmul_(x_zero.float(), w_sum * w_scale, value=-1)
    else:
        sum_TO = _products(x, weight)
        if x_zero is not None:
            assert w_sum is not None
            sum_TO.addcmul_(x_zero, w_sum, value=-1)
        y_TO = sum_TO.float().mul_(w_scale)
    if x_scale is not None:
        y_TO.mul_(x_scale)
    if bias is not None:
        y_TO.add_(bias)
    if low is not None:
        assert up is not None
        y_TO.addmm_(low.float(), up.float().T)
    return y_TO.to(dtype)


def gated_codes(x: Codes, weight: Tensor, w_scale: Tensor, w_sum: Tensor, bias: Tensor | None, dtype: torch.dtype, grid: native.Grid) -> Codes | None:
    """silu_mul_quantize of the two halves, gate and up, of linear_w8a8 in dtype, in one pass; None without compiler or prepacked weight."""
    codes, scale, zero = x
    if not weight.is_mkldnn:
        return None
    zero_T1, sums_O = (zero, w_sum * w_scale) if len(zero) else (None, None)
    return native.finish_silu_mul_quantize(_prepacked(codes, weight, w_scale), scale, zero_T1, sums_O, bias, dtype, grid)


def grid(bits: int, symmetric: bool, clip: float) -> native.Grid:
    """How the passes of native.cpp quantize a token."""
    return native.Grid(bits, symmetric, clip, LEAST)


def prepack(weight_OI: Tensor) -> Tensor | None:
    """An int8 weight in oneDNN's own layout, an opaque tensor (I, O) for linear_w8a8; None where this torch has no oneDNN, or that is not exact.

    Its product, the weight's scales included, takes about half as long as torch._int_mm's on a strided one.
    """
    if not exact():
        return None
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight_OI.contiguous(), None)
    return packed


@lru_cache(maxsize=1)
def exact() -> bool:
    """Whether oneDNN is there, and right about bytes: on the largest codes."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_prepack"):  # type: ignore[no-untyped-call]
        return False
    codes = torch.full((_WORST, _WORST), 127, dtype=torch.int8, device="cpu")
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    return bool((_prepacked(codes, packed, torch.ones(_WORST, device="cpu")) == _WORST * 127**2).all())


def _products(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Sums of products of codes: (T, O) int32, exact."""
    if exact():
        found_TO: Tensor = torch.ops.aten._int_mm(x_TI, weight_OI.T)
        return found_TO
    sum_TO = torch.zeros(len(x_TI), len(weight_OI), dtype=torch.int32, device=x_TI.device)
    parts = [x.float() for x in torch.split(x_TI, _HELD, 1)]
    rows = max(1, _WIDENED // max(1, weight_OI.shape[1]))
    for sums, some_OI in zip(torch.split(sum_TO, rows, 1), torch.split(weight_OI, rows), strict=True):
        for x, w in zip(parts, torch.split(some_OI, _HELD, 1), strict=True):
            sums += torch.mm(x, w.float().T).to(torch.int32)
    return sum_TO


def _prepacked(x: Tensor, weight: Tensor, w_scale: Tensor) -> Tensor:
    """x (weight w_scale)' in float32."""
    tokens, rows = len(x), -(-_LEAST_PRODUCT // len(w_scale))
    x = x if tokens >= rows else torch.nn.functional.pad(x, (0, 0, 0, rows - tokens))
    x, zero = (x, 0) if _takes_signed() else (x.view(torch.uint8) ^ 128, 128)
    zeros_O = _zeros(len(w_scale))
    y_TO: Tensor = torch.ops.onednn.qlinear_pointwise(x, 1.0, zero, weight, w_scale, zeros_O, None, 1.0, 0, torch.float32, "none", [], "")
    return y_TO[:tokens]


@lru_cache(maxsize=1)
def _takes_signed() -> bool:
    """Whether oneDNN multiplies signed inputs quickly: with AMX. VNNI's are unsigned, and there oneDNN takes seconds for signed ones."""
    amx = bool(torch.cpu.get_capabilities().get("amx_int8"))
    return amx and "ONEDNN_MAX_CPU_ISA" not in os.environ


@lru_cache(maxsize=64)
def _zeros(outputs: int) -> Tensor:
    return torch.zeros(outputs, dtype=torch.int32, device="cpu")


def linear_w4a8(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    w_sum: Tensor | None,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The weight is packed. On a CPU it is unpacked at every call; unpack it once and take linear_w8a8 where memory allows."""
    return linear_w8a8(x, x_scale, x_zero, unpack_nibbles(weight), w_scale, w_sum, bias, low, up, dtype)


def linear_w4a4(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    w_sum: Tensor | None,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Both are packed. On a CPU as linear_w4a8."""
    return linear_w8a8(unpack_nibbles(x), x_scale, x_zero, unpack_nibbles(weight), w_scale, w_sum, bias, low, up, dtype)


def linear_w4a16(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """The weight is dequantized and rounded to x's dtype, then multiplied; not rounded for few tokens, and without instructions for bfloat16."""
    bias = None if bias is None else bias.to(x.dtype)
    if len(x) <= FEW and decodes(x.shape[1], scale.shape[1]) and (few_TO := native.weight_only(x, weight, scale, zero, bias)) is not None:
        return few_TO
    if x.dtype == torch.bfloat16 and not multiplies_bfloat16():
        parts = [weight, scale] if zero is None else [weight, scale, zero]
        return _in_float32(x, len(weight), lambda rows: _dequantized(*(part[rows] for part in parts), dtype=torch.float32), bias)
    return torch.nn.functional.linear(x, _dequantized(weight, scale, zero, dtype=x.dtype), bias)


def _dequantized(weight: Tensor, scale: Tensor, zero: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    if (w_OI := native.dequantize(weight, scale, zero, dtype)) is not None:
        return w_OI
    w_OGI = by_group(unpack_nibbles(weight).float(), scale.shape[1])
    if zero is not None:
        w_OGI = w_OGI.sub_(zero[:, :, None])
    return w_OGI.mul_(scale[:, :, None]).flatten(1).to(dtype)


def decodes(inputs: int, groups: int) -> bool:
    """Whether there is a pass for few tokens over packed weight-only codes: they are decoded in registers. For groups of whole 32s, or one."""
    return native.there("weight_only_bfloat16") and (groups == 1 or (inputs % 64 == 0 and inputs // groups % 32 == 0))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (T, I) weight' + bias, (T, O), all of one dtype. bfloat16 in float32, rounded once, where the processor has no products of it: torch's take
    three to seven times as long there, twice as long for a few tokens."""
    if x.dtype != torch.bfloat16 or multiplies_bfloat16():
        return torch.nn.functional.linear(x, weight, bias)
    if (few_TO := native.few(x, weight, bias)) is not None:
        return few_TO
    return _in_float32(x, len(weight), lambda rows: weight[rows].float(), bias)


def _in_float32(x: Tensor, outputs: int, weight: Callable[[slice], Tensor], bias: Tensor | None) -> Tensor:
    """x weight' + bias, a piece of the weight at a time. weight: some rows of it, float32."""
    y_TO, wide = x.new_empty(len(x), outputs), x.float()
    step = max(1, _WIDENED // max(1, x.shape[1]))
    for rows in (slice(first, first + step) for first in range(0, outputs, step)):
        y_TO[:, rows] = torch.nn.functional.linear(wide, weight(rows), None if bias is None else bias[rows].float())
    return y_TO


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it: AVX512-BF16 or AMX; taken for granted on others than x86."""
    has = torch.cpu.get_capabilities()
    return has.get("architecture") != "x86_64" or bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def linear_fp8(x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Products and sums in float32."""
    y_TO = (x.float() @ weight.float().T).mul_(x_scale).mul_(w_scale)
    return (y_TO if bias is None else y_TO.add_(bias)).to(dtype)


for _implementation in (
    quantize_per_token,
    rms_norm_quantize,
    silu_mul_quantize,
    hadamard_quantize,
    blocks_quantize,
    quantize_fp8,
    linear_w8a8,
    linear_w4a8,
    linear_w4a4,
    linear_w4a16,
    linear_fp8,
):
    LIBRARY.impl(_implementation.__name__, _implementation, "CPU")  # type: ignore[no-untyped-call]
LIBRARY.impl("linear_w8a8", linear_w8a8, "MkldnnCPU")  # type: ignore[no-untyped-call]
