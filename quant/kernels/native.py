"""The C++ passes of native.cpp for the operators on a CPU, compiled once on the machine where they run.

Without a C++ compiler, and with PLANISH_COMPILER set to nothing, the operators are made of torch's own operations: the same results, in more passes
over memory. `found()` says which of the two it is, and why.

Each function answers None (or False) where it does not apply: other devices and dtypes than float32 and bfloat16, strides inside a row, processors
for which there is no such pass, and under torch.compile, whose own compiler does better with what surrounds them.

Shape suffixes: T tokens, C = I in channels, O out channels, G groups, B batches, H heads, D channels of a head.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache_folder import cache_folder

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_SECONDS = 120.0
FEW = 4  # tokens for which reading a weight takes longer than multiplying it

Codes = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Found:
    """library: the compiled passes, or None, and why: in one sentence."""

    library: ctypes.CDLL | None
    why: str


@lru_cache(maxsize=1)
def found() -> Found:
    """The compiled passes. The first call compiles them, in two or three seconds, unless they lie in the user's cache already."""
    named = os.environ.get("PLANISH_COMPILER")
    compiler = shutil.which(named) if named else None if named == "" else shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return Found(None, "there is no C++ compiler" if named is None else f"PLANISH_COMPILER={named!r} is none")
    try:
        return Found(ctypes.CDLL(str(_compiled(compiler))), f"compiled by {compiler}")
    except subprocess.CalledProcessError as error:
        return Found(None, f"{compiler} failed: {error.stderr.strip()[-300:]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Found(None, f"{compiler} failed: {error}")


def _compiled(compiler: str) -> Path:
    """The library of this source, compiler and processor, in the cache."""
    path = cache_folder() / "kernels" / f"native-{_key(compiler)}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = Path(folder) / path.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(partial)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
            partial.replace(path)
    return path


def _key(compiler: str) -> str:
    """A cache may be shared by machines whose processors differ."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=_SECONDS).stdout
    return hashlib.sha256("\n".join([*sources, *FLAGS, compiler, version, processor]).encode()).hexdigest()[:16]


def _function(name: str, *tensors: Tensor) -> Any:
    """The pass of this name for these tensors, all of one dtype; None where it does not apply."""
    dtype, suffix = tensors[0].dtype, _NAMES.get(tensors[0].dtype)
    if suffix is None or torch.compiler.is_compiling() or (library := found().library) is None:
        return None
    if any(x.device.type != "cpu" or x.dtype != dtype or (x.dim() > 0 and x.stride(-1) != 1 and x.numel() > 0) for x in tensors):
        return None
    return getattr(library, f"planish_{name}_{suffix}", None)


def there(name: str) -> bool:
    """Whether planish_`name` was compiled."""
    return hasattr(found().library, f"planish_{name}")


def _pointer(x: Tensor | None) -> ctypes.c_void_p | None:
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def _long(value: int) -> ctypes.c_long:
    return ctypes.c_long(value)


@dataclass(frozen=True, slots=True)
class Grid:
    """How a token is quantized: bits 2 to 8, clip as a share of its range, least: the smallest scale there is."""

    bits: int
    symmetric: bool
    clip: float
    least: float

    def results(self, x_TC: Tensor) -> Codes:
        """Room for codes (T, C), scale (T, 1), zero (T, 1) or (0, 1)."""
        rows = len(x_TC)
        zero = x_TC.new_empty((0 if self.symmetric else rows, 1), dtype=torch.int32)
        return x_TC.new_empty(x_TC.shape, dtype=torch.int8), x_TC.new_empty((rows, 1), dtype=torch.float32), zero

    def operands(self, codes: Codes) -> tuple[Any, ...]:
        """The last operands of a pass that quantizes."""
        given = (self.bits, int(self.symmetric), ctypes.c_float(self.clip), ctypes.c_float(self.least))
        return (*given, _pointer(codes[0]), _pointer(codes[1]), None if self.symmetric else _pointer(codes[2]), torch.get_num_threads())


def _shape(x_TC: Tensor) -> tuple[ctypes.c_long, ctypes.c_long, ctypes.c_long]:
    return _long(x_TC.shape[0]), _long(x_TC.shape[1]), _long(x_TC.stride(0))


def quantize(x_TC: Tensor, grid: Grid) -> Codes | None:
    """cpu.quantize_per_token."""
    if (function := _function("quantize", x_TC)) is None:
        return None
    codes = grid.results(x_TC)
    function(_pointer(x_TC), *_shape(x_TC), *grid.operands(codes))
    return codes


def rms_norm(x_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor | None:
    """x_TC / sqrt(mean(x²) + eps), rounded, times weight_C, rounded: (T, C), as the norms of Llama and its kin compute it."""
    if (function := _function("rms_norm", x_TC, weight_C)) is None:
        return None
    y_TC = x_TC.new_empty(x_TC.shape)
    if x_TC.dtype == torch.bfloat16:
        function = getattr(found().library, "planish_tiles_rms_norm", function)
    function(_pointer(x_TC), _pointer(weight_C), ctypes.c_float(eps), *_shape(x_TC), _pointer(y_TC), torch.get_num_threads())
    return y_TC


def few(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor | None:
    """x weight' + bias of bfloat16, summed in float32 and rounded once, for at most 4 tokens: (T, O)."""
    tokens, inputs = x_TI.shape
    if not 0 < tokens <= FEW or inputs % 16 or x_TI.dtype != torch.bfloat16 or not weight_OI.is_contiguous():
        return None
    given = [x_TI, weight_OI] if bias_O is None else [x_TI, weight_OI, bias_O]
    if (function := _function("few", *given)) is None:
        return None
    y_TO = x_TI.new_empty((tokens, len(weight_OI)))
    rows, width, stride = _shape(x_TI)
    function(
        _pointer(x_TI), rows, stride, _pointer(weight_OI), _pointer(bias_O), _long(len(weight_OI)), width, _pointer(y_TO), torch.get_num_threads()
    )
    return y_TO


def weight_only(x_TI: Tensor, packed: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bias_O: Tensor | None) -> Tensor | None:
    """x times packed 4-bit codes and their group scales, summed in float32 and rounded once: (T, O). Only for what cpu.decodes says yes to."""
    (tokens, _), groups = x_TI.shape, scale_OG.shape[1]
    if not tokens or not packed.is_contiguous():
        return None
    given = [x_TI] if bias_O is None else [x_TI, bias_O]
    if (function := _function("weight_only", *given)) is None:
        return None
    y_TO = x_TI.new_empty((tokens, len(packed)))
    rows, width, stride = _shape(x_TI)
    grids = [None if grid is None else grid.float().contiguous() for grid in (scale_OG, zero_OG)]
    operands = (_pointer(packed), *map(_pointer, grids), _pointer(bias_O), _long(len(packed)), width, _long(groups))
    function(_pointer(x_TI), rows, stride, *operands, _pointer(y_TO), torch.get_num_threads())
    return y_TO


def rotary(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor | None:
    """x cos + (-x2, x1) sin, each product and the sum rounded to x's dtype, where x1 and x2 are the halves of D. cos and sin: B or 1 of them."""
    batches, heads, tokens, width = x_BHTD.shape
    angles = ((batches, tokens, width), (1, tokens, width))
    if width % 2 or cos_BTD.shape not in angles or cos_BTD.shape != sin_BTD.shape or not (cos_BTD.is_contiguous() and sin_BTD.is_contiguous()):
        return None
    if (function := _function("rotary", x_BHTD, cos_BTD, sin_BTD)) is None:
        return None
    y_BHTD = x_BHTD.new_empty((batches, tokens, heads, width)).transpose(1, 2)
    places = map(_long, (*x_BHTD.stride()[:3], batches, heads, tokens, width))
    angles_stride = _long(0 if len(cos_BTD) == 1 else tokens * width)
    function(_pointer(x_BHTD), *places, _pointer(cos_BTD), _pointer(sin_BTD), angles_stride, _pointer(y_BHTD), torch.get_num_threads())
    return y_BHTD


def rms_norm_quantize(x_TC: Tensor, weight_C: Tensor, eps: float, grid: Grid) -> Codes | None:
    """cpu.rms_norm_quantize."""
    if (function := _function("rms_norm_quantize", x_TC, weight_C)) is None:
        return None
    codes = grid.results(x_TC)
    function(_pointer(x_TC), _pointer(weight_C), ctypes.c_float(eps), *_shape(x_TC), *grid.operands(codes))
    return codes


def silu_mul_quantize(gate_TC: Tensor, up_TC: Tensor, grid: Grid) -> Codes | None:
    """cpu.silu_mul_quantize."""
    if (function := _function("silu_mul_quantize", gate_TC, up_TC)) is None:
        return None
    codes = grid.results(up_TC)
    rows, width, stride = _shape(up_TC)
    function(_pointer(gate_TC), _long(gate_TC.stride(0)), _pointer(up_TC), stride, rows, width, *grid.operands(codes))
    return codes


def clip_search(
    w_RK: Tensor, largest_RE: Tensor, scale_FR: Tensor, zero_FR: Tensor | None, unit_FR: Tensor, ends: tuple[float, float], power: float
) -> Tensor | None:
    """The candidate of each row that loses least, int64 (R): the least of unit_FR sum |w / scale - code|^power, codes within the ends of the grid.

    largest_RE: the row's largest weights, tried first: candidates that cannot be the best any more are left, row by row.
    """
    given = [w_RK, largest_RE, scale_FR, unit_FR] + ([] if zero_FR is None else [zero_FR])
    if any(x.device.type != "cpu" or x.dtype != torch.float32 for x in given) or (library := found().library) is None:
        return None
    best_R = torch.empty(len(w_RK), dtype=torch.int64, device="cpu")
    w_RK, largest_RE, scale_FR, unit_FR = (x.contiguous() for x in (w_RK, largest_RE, scale_FR, unit_FR))
    zero_FR = None if zero_FR is None else zero_FR.contiguous()
    library.planish_clip_search(
        *map(_pointer, (w_RK, largest_RE)),
        *(_long(size) for size in (*w_RK.shape, largest_RE.shape[1])),
        *map(_pointer, (scale_FR, zero_FR, unit_FR)),
        _long(len(scale_FR)),
        *(ctypes.c_float(value) for value in (*ends, power)),
        _pointer(best_R),
        torch.get_num_threads(),
    )
    return best_R


def finish(
    x_TO: Tensor, scale: Tensor | None, zero: Tensor | None, sums_O: Tensor | None, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """(x - zero sums) scale + bias, rounded once, to dtype: (T, O). x_TO: float32; scale, zero: (T, 1) or (1, 1); sums_O in x's unit."""
    y_TO = x_TO.new_empty(x_TO.shape, dtype=dtype)
    if x_TO.dtype != torch.float32 or not x_TO.is_contiguous() or (function := _function("finish", y_TO)) is None:
        return None
    scale, zero = None if scale is None else scale.float().contiguous(), None if zero is None else zero.int().contiguous()
    bias_O, sums_O = None if bias_O is None else bias_O.float().contiguous(), None if sums_O is None else sums_O.float().contiguous()
    steps = [_long(int(grid is not None and len(grid) > 1)) for grid in (scale, zero)]
    rows, width = (_long(size) for size in x_TO.shape)
    given = (_pointer(scale), steps[0], _pointer(zero), steps[1], _pointer(sums_O), _pointer(bias_O))
    function(_pointer(x_TO), *given, rows, width, _pointer(y_TO), torch.get_num_threads())
    return y_TO


def finish_silu_mul_quantize(
    x_TN: Tensor, scale_T1: Tensor, zero_T1: Tensor | None, sums_N: Tensor | None, bias_N: Tensor | None, dtype: torch.dtype, grid: Grid
) -> Codes | None:
    """silu_mul_quantize of the two halves, gate and up, of what `finish` makes in dtype: N is twice the width of the codes."""
    function = _function("finish_silu_mul_quantize", x_TN.new_empty(0, dtype=dtype))
    if x_TN.dtype != torch.float32 or not x_TN.is_contiguous() or function is None:
        return None
    codes = grid.results(x_TN[:, : x_TN.shape[1] // 2])
    bias_N = None if bias_N is None else bias_N.float().contiguous()
    given = (_pointer(scale_T1), _pointer(zero_T1), _pointer(sums_N), _pointer(bias_N))
    function(_pointer(x_TN), *given, *(_long(size) for size in codes[0].shape), *grid.operands(codes))
    return codes


def dequantize(packed: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Packed 4-bit codes times their group scales, rounded to dtype: (O, I)."""
    outputs, inputs = packed.shape[0], 2 * packed.shape[1]
    weight_OI = packed.new_empty((outputs, inputs), dtype=dtype)
    if packed.device.type != "cpu" or not packed.is_contiguous() or (function := _function("dequantize", weight_OI)) is None:
        return None
    grids = [None if grid is None else grid.float().contiguous() for grid in (scale_OG, zero_OG)]
    sizes = (_long(size) for size in (outputs, inputs, scale_OG.shape[1]))
    function(_pointer(packed), *map(_pointer, grids), *sizes, _pointer(weight_OI), torch.get_num_threads())
    return weight_OI
