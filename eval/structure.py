"""What config.json declares against what the files hold: names, dtypes, shapes, bits, and the values' ranges.

A linear has N outputs and K inputs.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..calib.checkpoint import build_skeleton
from ..calib.convert import REJECTED
from ..calib.extension import KEY, Extension, SiteInput, chain_prefix, restored
from ..calib.locate import weight_files
from ..calib.naming import LEFTOVERS
from ..calib.packing import GUARD, OWN, PLAIN, Packed, is_own, read_config, stored_names
from ..calib.prefix import tensor_names
from ..calib.shards import CHUNK_BYTES, TensorInfo, read_chunks, read_json, read_shards, read_tensor
from ..calib.side import FLOATS, expected_tensors, side_name
from ..calib.topology import Topology, topology
from ..quant.errors import PlanishError
from ..quant.formats import WeightFormat, code_range
from ..quant.transforms.factors import on_input
from .check import Check, listed

MARK = ".planish."  # in the names of tensors that only planish knows


@dataclass(frozen=True, slots=True)
class Layout:
    """A compressed checkpoint as it lies on disk, nothing of it checked yet.

    linears: (N, K) of every linear layer by name. packed: how those that are declared quantized should be stored. extension: what else is declared.
    own: planish alone runs it.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    skeleton: PreTrainedModel
    linears: Mapping[str, tuple[int, int]]
    packed: Mapping[str, Packed]
    extension: Extension
    own: bool = False


def declared(folder: Path) -> dict[str, Any]:
    """The quantization_config of config.json. Errors: no such file, or not a compressed-tensors checkpoint."""
    quantization = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") not in (PLAIN, OWN):
        found = "none" if not quantization else f"{quantization!r:.120}"
        raise PlanishError(f"{folder / 'config.json'}: quantization_config: {found}. Give a compressed-tensors checkpoint, such as planish writes.")
    return quantization


def read_layout(folder: Path) -> Layout:
    """Read config.json and the headers of the weight files. Errors: they are broken, or the format is one that planish does not read."""
    quantization = declared(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except REJECTED as error:
        raise PlanishError(f"{folder / 'config.json'}: transformers does not take it: {error}") from error
    assert isinstance(config, PreTrainedConfig)
    vars(config).pop("quantization_config")
    skeleton = build_skeleton(config, torch.float32, folder)
    linears: dict[str, tuple[int, int]] = {}
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Linear):
            linears[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            linears[name] = (module.weight.shape[1], module.weight.shape[0])
    try:
        packed = read_config(quantization, linears)
    except ValidationError as error:
        raise PlanishError(f"{folder / 'config.json'}: quantization_config: {error}") from error
    extension = Extension.read(read_json(folder / "config.json"))
    return Layout(folder, read_shards(weight_files(folder)), skeleton, linears, packed, extension, is_own(quantization))


def check_structure(layout: Layout) -> Check:
    """Every tensor that the declaration calls for is there in the right dtype and shape, and nothing else is."""
    faults = [*_quantized_faults(layout), *_plain_faults(layout), *_extension_faults(layout), *_guard_faults(layout), *_unexpected(layout)]
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
    codes = sum(math.prod(layout.linears[name]) * _format(how).bits for name, how in layout.packed.items())
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
        "model_bits": 8 * everything / parameters,
        "bytes": everything,
    }


def check_values(layout: Layout) -> Check:
    """Every number is finite, scales are positive, codes and zero points lie within the declared bits and make use of them."""
    faults: list[str] = []
    used: dict[WeightFormat, int] = defaultdict(int)
    formats = {f"{name}.{local}": _format(how) for name, how in layout.packed.items() for local in stored_names(how)}
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


def _format(how: Packed) -> WeightFormat:
    assert how.scheme.weights is not None
    return how.scheme.weights


def _nbytes(layout: Layout, name: str) -> int:
    info = layout.tensors.get(name)
    return 0 if info is None else info.nbytes


def _quantized_faults(layout: Layout) -> Iterator[str]:
    for name, how in layout.packed.items():
        size, inputs = _format(how).group_size, layout.linears[name][1]
        if size and inputs % size:
            yield f"{name}: config.json declares groups of {size}, which do not divide its {inputs} inputs"
            continue
        for local in stored_names(how):
            info = layout.tensors.get(f"{name}.{local}")
            if info is None:
                yield f"{name}.{local} is missing, but config.json declares it ({_describe(how)})"
                continue
            dtypes, shapes = _expected(how, local, *layout.linears[name])
            if info.dtype not in dtypes:
                yield f"{name}.{local} is {_short(info.dtype)}, but {_describe(how)} makes it {' or '.join(map(_short, dtypes))}"
            if info.shape not in shapes:
                yield f"{name}.{local} has shape {info.shape}, but {_describe(how)} makes it {shapes[0]}"
            elif local == "weight_shape" and info.dtype is torch.int64 and tuple(read_tensor(info).tolist()) != layout.linears[name]:
                yield f"{name}.weight_shape says {tuple(read_tensor(info).tolist())}, but the layer is {layout.linears[name]}"


def _expected(how: Packed, local: str, n: int, k: int) -> tuple[tuple[torch.dtype, ...], tuple[tuple[int, ...], ...]]:
    """Possible dtypes and shapes of a quantized linear's tensor."""
    fmt = _format(how)
    groups = fmt.groups(k)
    scales: tuple[tuple[int, ...], ...] = ((1,), (1, 1), ()) if fmt.granularity == "tensor" else ((n, groups),)
    packed = how.layout == "pack-quantized" and fmt.granularity != "tensor"
    match local:
        case "weight":
            return (torch.int8,), ((n, k),)
        case "weight_packed":
            return (torch.int32,), ((n, math.ceil(k * fmt.bits / 32)),)
        case "weight_shape":
            return (torch.int64,), ((2,),)
        case "weight_scale":
            return FLOATS, scales
        case "weight_zero_point" if packed:
            return (torch.int32,), ((math.ceil(n * fmt.bits / 32), groups),)
        case "weight_zero_point":
            return (torch.int8,), scales
        case "input_zero_point":
            return (torch.int8,), ((1,), (1, 1), ())
        case _:
            return FLOATS, ((1,), (1, 1), ())


def _plain_faults(layout: Layout) -> Iterator[str]:
    """Of the parameters that stay in full precision."""
    quantized = {f"{name}.weight" for name in layout.packed}
    tied = layout.skeleton.all_tied_weights_keys
    for name, parameter in layout.skeleton.named_parameters():
        info = layout.tensors.get(name)
        if name in quantized:
            continue
        if info is None:
            if tied.get(name) not in layout.tensors:
                yield f"{name} is missing"
        elif info.dtype not in FLOATS:
            yield f"{name} is {_short(info.dtype)}, but config.json leaves it in full precision"
        elif info.shape != tuple(parameter.shape):
            yield f"{name} has shape {info.shape}, but config.json makes it {tuple(parameter.shape)}"


def _extension_faults(layout: Layout) -> Iterator[str]:
    """Of what is declared beyond compressed-tensors: chains that cannot be made, or do not fit their sites; a prefix that is not there."""
    if not layout.extension:
        return
    topology = _topology(layout)
    sites = {site.name: site for site in topology.sites}
    for address, site_input in layout.extension.sites.items():
        index, _, name = address.partition(".")
        if name not in sites or not index.isdecimal() or int(index) >= topology.block_count:
            yield f"config.json: {KEY}.sites has {address}, which the model has not"
            continue
        block = topology.block_name(int(index))
        names = [tensor for tensor in layout.tensors if tensor.startswith(chain_prefix(block, name))]
        width = layout.linears[f"{block}.{sites[name].readers[0]}"][1]
        try:
            chain = restored(site_input, block, name, {tensor: read_tensor(layout.tensors[tensor]) for tensor in names})
            on_input(chain, torch.zeros(1, width))
        except PlanishError as error:
            yield f"{address}: {error}"
        except (RuntimeError, IndexError) as error:
            yield f"{address}: its transform does not fit {width} channels ({error})"
        yield from _side_faults(layout, site_input, block, sites[name].readers)
    if layout.extension.prefix:
        names = [tensor for index in range(topology.block_count) for tensor in tensor_names(topology.block_name(index))]
        yield from (f"{tensor} is missing, but config.json declares a prefix" for tensor in names if tensor not in layout.tensors)


def _guard_faults(layout: Layout) -> Iterator[str]:
    """Where others could load what planish alone runs."""
    for name in (f"{name}.{GUARD}" for name in layout.packed if layout.own):
        info = layout.tensors.get(name)
        if info is None or info.shape != (0,):
            yield f"{name} is {'missing' if info is None else 'not empty'}, so other software would load a checkpoint that planish alone runs"


def _side_faults(layout: Layout, site_input: SiteInput, block: str, readers: Sequence[str]) -> Iterator[str]:
    """Of the side paths of a site's readers, paths in the block: missing tensors, wrong dtypes or shapes, ranks of readers that there are not."""
    yield from (f"config.json: {KEY}.sites has a rank for {block}.{path}, which its site has not" for path in site_input.ranks if path not in readers)
    for path in readers:
        for local, (dtypes, shape) in expected_tensors(site_input, path, *layout.linears[f"{block}.{path}"]).items():
            name = side_name(f"{block}.{path}", local)
            info = layout.tensors.get(name)
            if info is None:
                yield f"{name} is missing, but config.json declares it"
            elif info.dtype not in dtypes or info.shape != shape:
                made = f"{' or '.join(map(_short, dtypes))} of shape {shape}"
                yield f"{name} is {_short(info.dtype)} of shape {info.shape}, but config.json makes it {made}"


def _topology(layout: Layout) -> Topology:
    config = layout.skeleton.config
    assert isinstance(config, PreTrainedConfig)
    return topology(config)


def _extra_names(layout: Layout) -> set[str]:
    """Tensors that belong to the declared extension: of chains, of side paths, of the prefix, and biases that shifts make."""
    if not layout.extension:
        return set()
    known, names = _topology(layout), set[str]()
    for address, site_input in layout.extension.sites.items():
        index, _, name = address.partition(".")
        site = next((site for site in known.sites if site.name == name), None)
        if site is None or not index.isdecimal():
            continue
        block = known.block_name(int(index))
        names |= {tensor for tensor in layout.tensors if tensor.startswith(chain_prefix(block, name))}
        names |= {f"{block}.{path}.bias" for path in site.readers if any(factor.get("kind") == "shift" for factor in site_input.chain)}
        names |= {side_name(f"{block}.{path}", local) for path in site.readers for local in expected_tensors(site_input, path, 0, 0)}
    if layout.extension.prefix:
        names |= {tensor for index in range(known.block_count) for tensor in tensor_names(known.block_name(index))}
    return names


def _unexpected(layout: Layout) -> Iterator[str]:
    known = {*layout.skeleton.state_dict(), *layout.skeleton.all_tied_weights_keys} - {f"{name}.weight" for name in layout.packed}
    known |= {f"{name}.{local}" for name, how in layout.packed.items() for local in stored_names(how)} | _extra_names(layout)
    known |= {f"{name}.{GUARD}" for name in layout.packed if layout.own}
    yield from (f"{name} is unexpected" for name in sorted(layout.tensors) if name not in known and not name.endswith(LEFTOVERS))


def _describe(how: Packed) -> str:
    fmt = _format(how)
    return f"{how.layout} with {fmt.bits}-bit weights per {f'group of {fmt.group_size}' if fmt.group_size else fmt.granularity}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
