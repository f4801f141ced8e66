"""Integer linears and gated MLPs for bfloat16 on CPUs with AMX, AVX512-VNNI or AVX2: quantize, multiply and scale in one operator (tiles.h).

Two more operators in torch's namespace `planish`, for CPUs only. They compute what quantize_per_token, silu_mul_quantize and linear_w8a8 do one after
the other, rounded where those round, but for the last bit of exp. x: (T, I) bfloat16; tiles: a weight as `tiles` lays it out; w_scale: (O,) float32;
w_sum: (O,) int32; bias: (O,) float32. In the MLP the first weight's rows are all gates, then all ups, as many as a multiple of 16.

Shape suffixes: T tokens, I in channels, O out channels.
"""

import ctypes
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .native import found
from .schemas import LIBRARY

_SIDE, _DEPTH = 16, 64
_WEIGHT = "Tensor tiles, Tensor w_scale, Tensor w_sum, Tensor? bias, int bits, bool symmetric, float clip"
_DOWN = "Tensor down_tiles, Tensor down_scale, Tensor down_sum, Tensor? down_bias, int down_bits, bool down_symmetric, float down_clip"
SCHEMAS = (f"linear_tiles(Tensor x, {_WEIGHT}, float least) -> Tensor", f"mlp_tiles(Tensor x, {_WEIGHT}, {_DOWN}, float least) -> Tensor")
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)
for _schema in SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))  # type: ignore[no-untyped-call]


@lru_cache(maxsize=1)
def engine() -> int:
    """What multiplies: 3 AMX, 2 VNNI, 1 AVX2, 0 nothing, for want of a compiler or the instructions, or by oneDNN's ceiling, ONEDNN_MAX_CPU_ISA."""
    library, ceiling = found().library, os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    best = 0 if library is None else int(library.planish_engine())
    most = 3 if not ceiling else 2 if ceiling.startswith("AVX512_CORE_") else 1 if ceiling.startswith("AVX2") else 0
    return best if best <= most else 2 if most == 2 else 0  # compiled for AVX-512 there is nothing for AVX2


def tiles(codes_OI: Tensor) -> Tensor:
    """An int8 weight as the operators read it: one-dimensional int8, zeros where it is padded to 16 outputs by 64 inputs."""
    outputs, inputs = codes_OI.shape
    laid = torch.empty(-(-outputs // _SIDE) * -(-inputs // _DEPTH) * _SIDE * _DEPTH, dtype=torch.int8, device="cpu")
    codes_OI = codes_OI.contiguous()
    _library().planish_tiles(_pointer(codes_OI), ctypes.c_long(outputs), ctypes.c_long(inputs), _pointer(laid))
    return laid


def linear(
    x: Tensor, tiles: Tensor, w_scale: Tensor, w_sum: Tensor, bias: Tensor | None, bits: int, symmetric: bool, clip: float, least: float
) -> Tensor:
    """y_TO = Q(x) Ŵᵀ + bias."""
    x, y_TO = _dense(x), x.new_empty((len(x), len(w_scale)))
    grid = (bits, int(symmetric), ctypes.c_float(clip), ctypes.c_float(least))
    if len(x):
        sizes = (ctypes.c_long(len(w_scale)), ctypes.c_long(x.shape[1]))
        _library().planish_tiles_linear(
            engine(), *_rows(x), *map(_pointer, (tiles, w_scale, w_sum, bias)), *sizes, *grid, _pointer(y_TO), torch.get_num_threads()
        )
    return y_TO


def mlp(
    x: Tensor,
    tiles: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None,
    bits: int,
    symmetric: bool,
    clip: float,
    down_tiles: Tensor,
    down_scale: Tensor,
    down_sum: Tensor,
    down_bias: Tensor | None,
    down_bits: int,
    down_symmetric: bool,
    down_clip: float,
    least: float,
) -> Tensor:
    """y_TO = down(silu(gate(x)) up(x))."""
    x, y_TO = _dense(x), x.new_empty((len(x), len(down_scale)))
    first = (*map(_pointer, (tiles, w_scale, w_sum, bias)), ctypes.c_long(x.shape[1]), bits, int(symmetric), ctypes.c_float(clip))
    down = (*map(_pointer, (down_tiles, down_scale, down_sum, down_bias)), ctypes.c_long(len(down_scale)), ctypes.c_long(len(w_scale) // 2))
    grid = (down_bits, int(down_symmetric), ctypes.c_float(down_clip), ctypes.c_float(least))
    if len(x):
        _library().planish_tiles_mlp(engine(), *_rows(x), *first, *down, *grid, _pointer(y_TO), torch.get_num_threads())
    return y_TO


def _library() -> ctypes.CDLL:
    library = found().library
    assert library is not None
    return library


def _pointer(x: Tensor | None) -> ctypes.c_void_p | None:
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def _dense(x_TI: Tensor) -> Tensor:
    return x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()


def _rows(x_TI: Tensor) -> tuple[Any, ...]:
    return _pointer(x_TI), ctypes.c_long(len(x_TI)), ctypes.c_long(x_TI.stride(0))


def _fake_linear(x: Tensor, tiles: Tensor, w_scale: Tensor, *_rest: object) -> Tensor:
    return x.new_empty((x.shape[0], w_scale.shape[0]))


def _fake_mlp(
    x: Tensor,
    tiles: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None,
    bits: int,
    symmetric: bool,
    clip: float,
    down_tiles: Tensor,
    down_scale: Tensor,
    *_rest: object,
) -> Tensor:
    return x.new_empty((x.shape[0], down_scale.shape[0]))


LIBRARY.impl("linear_tiles", linear, "CPU")  # type: ignore[no-untyped-call]
LIBRARY.impl("mlp_tiles", mlp, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("planish::linear_tiles", _fake_linear, lib=LIBRARY)
torch.library.register_fake("planish::mlp_tiles", _fake_mlp, lib=LIBRARY)
