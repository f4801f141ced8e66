# pyright: reportCallIssue=false
# (a launch takes num_warps and the like, which Triton's types do not know)
"""The operators on a CUDA device, through Triton: what each computes is defined in `schemas`, the kernels are in triton_*.py.

`hopper_or_later`: devices of capability 9.0 and above have no instruction for 4-bit integers, and linear_w4a4 runs there as W4A8 does, on bytes
that it unpacks on the way; for now it does so on older devices, too. The operands are half as large, the arithmetic is that of 8 bits.

Functions take tensors of any device, for tests run them in Triton's interpreter.
"""

import math
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..transforms import hadamard as sylvester_paley
from ..transforms.factors import Blocks
from .cpu import quantize_fp8 as quantize_fp8
from .triton_blocks import blocks_kernel
from .triton_hadamard import hadamard_kernel
from .triton_linear import integer_kernel, weight_only_kernel
from .triton_quantize import quantize_kernel
from .tuning import Config, choose

Codes = tuple[Tensor, Tensor, Tensor]
_FEW_TOKENS = 2048
_LARGEST_TILE = 128 * 256  # values of a token that a program holds at once, padded, where it has 227 KiB of shared memory
_SMALL_TILE = 128 * 128  # elsewhere


def _results(x_TC: Tensor, symmetric: bool, packed: bool) -> Codes:
    rows, width = x_TC.shape
    codes = x_TC.new_empty((rows, width // 2 if packed else width), dtype=torch.int8)
    return codes, x_TC.new_empty((rows, 1), dtype=torch.float32), x_TC.new_empty((0 if symmetric else rows, 1), dtype=torch.int32)


def _rows(x_TC: Tensor) -> Tensor:
    return x_TC if x_TC.stride(1) == 1 else x_TC.contiguous()


def quantize_warps(block: int) -> int:
    """For so many values in half a token: as few threads as hold them in registers without spilling."""
    return min(8, max(1, block // 256)) if block <= 8192 else 32


def _quantize(x: Tensor, other: Tensor | None, eps: float, producer: int, bits: int, symmetric: bool, clip: float, packed: bool) -> Codes:
    codes, scale, zero = _results(x, symmetric, packed)
    x = _rows(x)
    other = x if other is None else other.contiguous() if other.ndim == 1 else _rows(other)
    block = 1 << ((x.shape[1] + 1) // 2 - 1).bit_length()
    if len(x):
        quantize_kernel[(len(x),)](
            x,
            other,
            codes,
            scale,
            zero,
            x.shape[1],
            x.stride(0),
            other.stride(0),
            eps,
            clip,
            PRODUCER=producer,
            BITS=bits,
            SYMMETRIC=symmetric,
            PACKED=packed,
            BLOCK=block,
            num_warps=quantize_warps(block),
            enable_fp_fusion=False,
        )
    return codes, scale, zero


def quantize_per_token(x: Tensor, bits: int, symmetric: bool, clip: float, packed: bool) -> Codes:
    """Codes of x_TC."""
    return _quantize(x, None, 0.0, 0, bits, symmetric, clip, packed)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, bits: int, symmetric: bool, clip: float, packed: bool) -> Codes:
    """Codes of x_TC / sqrt(mean(x²) + eps) * weight_C."""
    return _quantize(x, weight, eps, 1, bits, symmetric, clip, packed)


def silu_mul_quantize(gate: Tensor, up: Tensor, bits: int, symmetric: bool, clip: float, packed: bool) -> Codes:
    """Codes of silu(gate_TC) * up_TC."""
    return _quantize(gate, up, 0.0, 2, bits, symmetric, clip, packed)


@lru_cache(maxsize=64)
def _factors(width: int, block: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """left' (A, A), block-diagonal, and right (B, B) of 1 and -1."""
    left_AA, right_BB = sylvester_paley.kronecker_signs(block)
    left_AA = torch.kron(torch.eye(width // block, dtype=left_AA.dtype), left_AA)
    return left_AA.T.contiguous().to(device, dtype), right_BB.contiguous().to(device, dtype)


@lru_cache(maxsize=16)
def largest_tile(device: torch.device) -> int:
    """Of hadamard_kernel: compiled ahead for every architecture, larger ones do not fit on Ampere, Ada and consumer Blackwell, or spill."""
    roomy = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)
    return _LARGEST_TILE if roomy else _SMALL_TILE


def hadamard_quantize(x: Tensor, signs: Tensor | None, block: int, bits: int, symmetric: bool, clip: float, packed: bool) -> Codes:
    """Codes of (x_TC * signs_C) H. Widths whose Kronecker factors make too large a tile, or an odd number of its rows, are rotated by torch."""
    left_AA, right_BB = _factors(x.shape[1], block, torch.float32 if x.dtype == torch.float32 else torch.bfloat16, x.device)
    a, b = len(left_AA), len(right_BB)
    block_a, block_h, block_b = (max(16, triton.next_power_of_2(n)) for n in (a, a // 2, b))
    if a % 2 or block_a * block_b > largest_tile(x.device):
        return quantize_per_token(sylvester_paley.rotate(x if signs is None else x * signs.to(x.dtype), block), bits, symmetric, clip, packed)
    codes, scale, zero = _results(x, symmetric, packed)
    x = _rows(x)
    if len(x):
        hadamard_kernel[(len(x),)](
            x,
            x if signs is None else signs.contiguous(),
            left_AA,
            right_BB.to(x.dtype),
            codes,
            scale,
            zero,
            x.stride(0),
            1 / math.sqrt(block),
            clip,
            A=a,
            B=b,
            BLOCK_A=block_a,
            BLOCK_H=block_h,
            BLOCK_B=block_b,
            BLOCK_K=min(block_b, 32),
            SIGNS=signs is not None,
            BITS=bits,
            SYMMETRIC=symmetric,
            PACKED=packed,
            num_warps=8 if block_a * block_b > 2048 else 4,
            enable_fp_fusion=False,
        )
    return codes, scale, zero


def blocks_quantize(x: Tensor, matrix: Tensor, bits: int, symmetric: bool, clip: float, packed: bool, few: int = _FEW_TOKENS) -> Codes:
    """Codes of x_TC times the block-diagonal matrix_KBB, in one kernel. Up to `few` tokens, which are too few programs, where dtypes differ and where
    the width is odd: torch's product, then quantize_per_token."""
    rows, width = x.shape
    size = matrix.shape[1]
    if rows <= few or x.dtype != matrix.dtype or width % 2:
        return quantize_per_token(Blocks(matrix).on_input(x), bits, symmetric, clip, packed)
    codes, scale, zero = _results(x, symmetric, packed)
    x, unit, block_m, block_n, block_k = _rows(x), *blocks_tile(width, size)
    blocks_kernel[(triton.cdiv(rows, block_m),)](
        x,
        matrix.contiguous(),
        codes,
        scale,
        zero,
        rows,
        x.stride(0),
        clip,
        C=width,
        B=size,
        UNIT=unit,
        SHARED=len(matrix) == 1,
        BITS=bits,
        SYMMETRIC=symmetric,
        PACKED=packed,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8,
        num_stages=2,
        enable_fp_fusion=False,
    )
    return codes, scale, zero


def blocks_tile(width: int, size: int) -> tuple[int, int, int, int]:
    """Of blocks_kernel, for an even width in blocks of so many channels: UNIT, BLOCK_M, BLOCK_N, BLOCK_K."""
    unit = math.gcd(width // 2, size)
    block_n, block_k = (min(64, max(16, 1 << (n - 1).bit_length())) for n in (unit, size))
    return unit, 32, block_n, block_k


@lru_cache(maxsize=16)
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


def integer_linear(
    name: str,
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
    config: Config | None = None,
) -> Tensor:
    """linear_w8a8, linear_w4a8 or linear_w4a4, by name. config: None for what `tuning` chooses."""
    x, weight = _rows(x), _rows(weight)
    rows, columns = len(x), len(weight)
    y_TO = x.new_empty((rows, columns), dtype=dtype)
    if not rows or not columns:
        return y_TO
    c = config or choose(_name(x.device), name, rows, columns, weight.shape[1])
    side = low is not None and up is not None
    x_scale = w_scale.new_ones((1, 1) if x_zero is None else x_zero.shape) if x_scale is None else x_scale.contiguous()
    integer_kernel[(triton.cdiv(rows, c.block_m) * triton.cdiv(columns, c.block_n),)](
        x,
        x_scale,
        x_scale if x_zero is None else x_zero.contiguous(),
        weight,
        w_scale.contiguous(),
        w_scale if w_sum is None else w_sum.contiguous(),
        w_scale if bias is None else bias.contiguous(),
        low.contiguous() if low is not None else w_scale,
        up.contiguous() if up is not None else w_scale,
        y_TO,
        rows,
        columns,
        x.stride(0),
        weight.stride(0),
        0 if x_scale.numel() == 1 else 1,  # one token or a static grid
        steps=weight.shape[1],
        rank=low.shape[1] if low is not None else 0,
        X_PACKED=name == "linear_w4a4",
        W_PACKED=name != "linear_w8a8",
        ZERO=x_zero is not None,
        BIAS=bias is not None,
        SIDE=side,
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        BLOCK_R=16,
        GROUP=8,
        num_warps=c.warps,
        num_stages=c.stages,
    )
    return y_TO


def linear_w4a16(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, config: Config | None = None) -> Tensor:
    """A packed weight, dequantized on the way."""
    x, weight = _rows(x), weight.contiguous()
    rows, columns, steps = len(x), len(weight), weight.shape[1]
    y_TO = x.new_empty((rows, columns))
    if not rows or not columns:
        return y_TO
    c = config or choose(_name(x.device), "linear_w4a16", rows, columns, steps)
    size = 2 * steps // scale.shape[1]
    block_k, stages, uniform = weight_only_steps(c, steps, size)
    weight_only_kernel[(triton.cdiv(rows, c.block_m) * triton.cdiv(columns, c.block_n),)](
        x,
        weight,
        scale.contiguous(),
        scale if zero is None else zero.contiguous(),
        scale if bias is None else bias.contiguous(),
        y_TO,
        rows,
        columns,
        x.stride(0),
        scale.shape[1],
        steps=steps,
        SIZE=size,
        ZERO=zero is not None,
        BIAS=bias is not None,
        UNIFORM=uniform,
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        BLOCK_K=block_k,
        GROUP=8,
        num_warps=c.warps,
        num_stages=stages,
    )
    return y_TO


def weight_only_steps(config: Config, steps: int, size: int) -> tuple[int, int, bool]:
    """BLOCK_K, stages and UNIFORM of weight_only_kernel, for rows of so many bytes in groups of so many codes. A step is no longer than lies in one
    group in both halves of the row: then a column has one scale there. Groups that no step of 16 fits have a scale for every weight, too many to have
    several stages of in flight."""
    unit = math.gcd(steps, size)
    unit &= -unit  # the largest power of two in it
    if size == 2 * steps:
        return config.block_k, config.stages, True
    return (min(config.block_k, unit), config.stages, True) if unit >= 16 else (min(config.block_k, 64), 1, False)


def linear_fp8(x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """torch's own kernel, rounded to bfloat16 and then to dtype; it needs capability 8.9 and widths that are multiples of 16."""
    if not len(x):
        return x.new_empty((0, len(weight)), dtype=dtype)
    y_TO: Tensor = torch.ops.aten._scaled_mm(x, weight.T, scale_a=x_scale, scale_b=w_scale[None, :], out_dtype=torch.bfloat16)
    return (y_TO if bias is None else y_TO + bias).to(dtype)
