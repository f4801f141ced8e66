"""What config.json declares against what the files hold: names, dtypes, shapes, bits, and the values' ranges.

A linear has N outputs and K inputs.
"""

import math
from collections import defaultdict
from collections.abc import Iterator

import torch

from ...calib.compressed.extension import chain_prefix
from ...calib.compressed.layout import MARK, Layout, fitting, header_faults, placed, weight_format
from ...calib.compressed.packing import GUARD, stored_names
from ...calib.files.shards import CHUNK_BYTES, TensorInfo, read_chunks, read_tensor
from ...quant.errors import PlanishError
from ...quant.formats import WeightFormat, code_range
from ..scores.check import Check, listed


def check_structure(layout: Layout) -> Check:
    """Every tensor that the declaration calls for is there in the right dtype and shape, and nothing else is."""
    faults = [*header_faults(layout), *_shape_faults(layout), *_chain_faults(layout), *_guard_faults(layout)]
    if not layout.packed:
        faults.insert(0, "config.json declares no linear layer quantized")
    figures = bits(layout)
    message = (
        f"{figures['quantized_linears']} of {len(layout.linears)} linear layers as declared, {figures['quantized_bits']:.2f} bits per weight, "
        f"whole model {figures['model_bits']:.2f}"
    )
    return Check("structure", not faults, listed(faults) if faults else message, figures)


def bits(layout: Layout) -> dict[str, float | int]:
    """Bits per weight: a code's as declared; stored ones, all that goes with weights included, of the quantized linears and of the model."""
    weights = sum(math.prod(layout.linears[name]) for name in layout.packed)
    codes = sum(math.prod(layout.linears[name]) * weight_format(how).bits for name, how in layout.packed.items())
    stored = sum(_nbytes(layout, f"{name}.{local}") for name, how in layout.packed.items() for local in stored_names(how))
    stored += sum(info.nbytes for name, info in layout.tensors.items() if MARK in name)
    tied = layout.skeleton.all_tied_weights_keys
    parameters = sum(parameter.numel() for name, parameter in layout.skeleton.named_parameters() if name not in tied)
    everything = sum(info.nbytes for info in layout.tensors.values())
    return {
        "linears": len(layout.linears),
        "quantized_linears": len(layout.packed),
        "declared_bits": codes / weights if weights else 0.0,
        "quantized_bits": 8 * stored / weights if weights else 0.0,
        "model_bits": 8 * everything / max(1, parameters),
        "bytes": everything,
    }


def check_values(layout: Layout) -> Check:
    """Every number is finite, scales are positive, codes and zero points lie within the declared bits and make use of them."""
    faults: list[str] = []
    used: dict[WeightFormat, int] = defaultdict(int)
    formats = {f"{name}.{local}": weight_format(how) for name, how in layout.packed.items() for local in stored_names(how)}
    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    for name, info in sorted(layout.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
        local = name.rpartition(".")[2]
        if info.nbytes == 0 or not (info.dtype.is_floating_point or info.dtype is torch.int8):
            continue
        low, high = extent(info, buffer)
        if not math.isfinite(low) or not math.isfinite(high):
            faults.append(f"{name} has NaN or infinite values")
        elif local in ("weight_scale", "input_scale", "kept_scale") and low <= 0:
            faults.append(f"{name} has scales that are not positive, the smallest {low:g}")
        elif local in ("weight", "weight_zero_point") and name in formats and info.dtype is torch.int8:
            fmt = formats[name]
            least, most = code_range(fmt.bits)
            if low < least or high > most:
                faults.append(f"{name} has values from {low:g} to {high:g}, but {fmt.bits} bits hold {least} to {most}")
            if local == "weight":
                used[fmt] = max(used[fmt], _bits_of(low, high))
    faults += [
        f"config.json declares {fmt.bits}-bit weights, but no code needs more than {count} bits"
        for fmt, count in used.items()
        if 1 < count < fmt.bits
    ]
    message = listed(faults) if faults else "all numbers finite, scales positive, codes in range"
    return Check("values", not faults, message, {"tensors": len(layout.tensors)})


def extent(info: TensorInfo, buffer: torch.Tensor) -> tuple[float, float]:
    """Smallest and largest value, NaN if there is one; read in pieces that live in `buffer`."""
    low, high = math.inf, -math.inf
    for piece in read_chunks(info, buffer):
        values = piece if piece.dtype.itemsize > 1 or not piece.dtype.is_floating_point else piece.float()
        least, most = (value.item() for value in values.aminmax())
        if math.isnan(least) or math.isnan(most):
            return math.nan, math.nan
        low, high = min(low, least), max(high, most)
    return low, high


def _bits_of(low: float, high: float) -> int:
    """The fewest bits of a signed integer that hold both, 1 for zeros alone."""
    return max(int(-low - 1).bit_length() if low < 0 else 0, int(high).bit_length()) + 1


def _nbytes(layout: Layout, name: str) -> int:
    info = layout.tensors.get(name)
    return 0 if info is None else info.nbytes


def _shape_faults(layout: Layout) -> Iterator[str]:
    """Of the shapes that go with packed codes."""
    for name, shape in ((name, layout.linears[name]) for name in layout.packed):
        info = layout.tensors.get(f"{name}.weight_shape")
        if info is not None and (info.dtype, info.shape) == (torch.int64, (2,)) and tuple(read_tensor(info).tolist()) != shape:
            yield f"{name}.weight_shape says {tuple(read_tensor(info).tolist())}, but the layer is {shape}"


def _chain_faults(layout: Layout) -> Iterator[str]:
    """Of transforms that cannot be made, or do not fit their sites."""
    for _, site_input, block, site in placed(layout):
        names = [tensor for tensor in layout.tensors if tensor.startswith(chain_prefix(block, site.name))]
        width = layout.linears[f"{block}.{site.readers[0]}"][1]
        try:
            fitting(site_input, block, site.name, {tensor: read_tensor(layout.tensors[tensor]) for tensor in names}, width)
        except PlanishError as error:
            yield str(error)


def _guard_faults(layout: Layout) -> Iterator[str]:
    """Where others could load what planish alone runs."""
    for name in (f"{name}.{GUARD}" for name in layout.packed if layout.own):
        info = layout.tensors.get(name)
        if info is None or info.shape != (0,):
            yield f"{name} is {'missing' if info is None else 'not empty'}, so other software would load a checkpoint that planish alone runs"
