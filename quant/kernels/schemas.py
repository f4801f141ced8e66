"""The operators' schemas, one each, in torch's namespace `planish`, and what torch.compile knows of their results.

quantize_*: an activation x_TC, float16, bfloat16 or float32, becomes integer codes on a grid of its own for every token, as
`linear.quantize_input` computes them: (codes, scale, zero). codes: (T, C) int8, or (T, C / 2) as `nibbles` packs them if `packed`; scale: (T, 1)
float32; zero: (T, 1) int32, empty (0, 1) if symmetric. The fused ones first do what is in their names, rounded to x's dtype as a model's own layers
round it. A token that holds NaN or Inf has scale NaN and unspecified codes, so that every output made of it is NaN; others are untouched.

linear_*: y_TO = (x - x_zero) x_scale (weight w_scale)' + bias + low up', rounded once, to `dtype`. Integer products are exact, the rest is
float32. x: codes; x_scale, x_zero: (T, 1), or (1, 1) of a static grid, x_scale None: 1; weight: (O, I) codes, any strides, on a CPU also as
cpu.prepack lays it out; w_scale: (O,) float32; w_sum: (O,) int32, each row's sum of codes, needed with x_zero; bias: (O,); low: (T, R), what a side
path made of the input, and up: (O, R).
linear_w4a16: x float, weight packed, scale and zero (O, G), as `QuantizedLinear` of the dtype of x computes. linear_fp8: codes are float8_e4m3fn.

Shape suffixes: T tokens, C = I in channels, O out channels, G groups, R rank, K blocks of B channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_GRID = "int bits, bool symmetric, float clip, bool packed"
_CODES = "(Tensor codes, Tensor scale, Tensor zero)"
_INTEGER = (
    "Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor weight, Tensor w_scale, Tensor? w_sum, Tensor? bias, Tensor? low, Tensor? up, ScalarType dtype"
)
SCHEMAS = (
    f"quantize_per_token(Tensor x, {_GRID}) -> {_CODES}",
    f"rms_norm_quantize(Tensor x, Tensor weight, float eps, {_GRID}) -> {_CODES}",
    f"silu_mul_quantize(Tensor gate, Tensor up, {_GRID}) -> {_CODES}",
    f"hadamard_quantize(Tensor x, Tensor? signs, int block, {_GRID}) -> {_CODES}",
    f"blocks_quantize(Tensor x, Tensor matrix, {_GRID}) -> {_CODES}",
    "quantize_fp8(Tensor x) -> (Tensor codes, Tensor scale)",
    f"linear_w8a8({_INTEGER}) -> Tensor",
    f"linear_w4a8({_INTEGER}) -> Tensor",
    f"linear_w4a4({_INTEGER}) -> Tensor",
    "linear_w4a16(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? bias) -> Tensor",
    "linear_fp8(Tensor x, Tensor x_scale, Tensor weight, Tensor w_scale, Tensor? bias, ScalarType dtype) -> Tensor",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)

LIBRARY = torch.library.Library("planish", "DEF")  # type: ignore[no-untyped-call]
for _schema in SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))  # type: ignore[no-untyped-call]


def _quantized(x_TC: Tensor, symmetric: bool, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x_TC.shape
    scale_T1 = x_TC.new_empty((rows, 1), dtype=torch.float32)
    zero_T1 = x_TC.new_empty((0 if symmetric else rows, 1), dtype=torch.int32)
    return x_TC.new_empty((rows, width // 2 if packed else width), dtype=torch.int8), scale_T1, zero_T1


def _quantize(x: Tensor, bits: int, symmetric: bool, clip: float, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _quantized(x, symmetric, packed)


def _norm(x: Tensor, weight: Tensor, eps: float, bits: int, symmetric: bool, clip: float, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _quantized(x, symmetric, packed)


def _silu(gate: Tensor, up: Tensor, bits: int, symmetric: bool, clip: float, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _quantized(gate, symmetric, packed)


def _hadamard(x: Tensor, signs: Tensor | None, block: int, bits: int, symmetric: bool, clip: float, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _quantized(x, symmetric, packed)


def _blocks(x: Tensor, matrix: Tensor, bits: int, symmetric: bool, clip: float, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _quantized(x, symmetric, packed)


def _fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _integer_linear(
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
    return x.new_empty((x.shape[0], len(w_scale)), dtype=dtype)


def _linear_w4a16(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _linear_fp8(x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


_FAKES: dict[str, Callable[..., object]] = {
    "quantize_per_token": _quantize,
    "rms_norm_quantize": _norm,
    "silu_mul_quantize": _silu,
    "hadamard_quantize": _hadamard,
    "blocks_quantize": _blocks,
    "quantize_fp8": _fp8,
    "linear_w8a8": _integer_linear,
    "linear_w4a8": _integer_linear,
    "linear_w4a4": _integer_linear,
    "linear_w4a16": _linear_w4a16,
    "linear_fp8": _linear_fp8,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"planish::{_name}", _fake, lib=LIBRARY)
