"""Between planish's quantized weights and compressed-tensors checkpoints: config objects and packing are that library's own.

Tensors of a quantized linear (N out, K in): see the table of the compressed-tensors format; the codes are the solver's, bit for bit.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    DynamicType,
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from torch import Tensor

from ...quant.errors import PlanishError
from ...quant.formats import (
    NVFP4,
    NVFP4_GROUP,
    ActivationFormat,
    Factored,
    NumberType,
    QuantizedWeight,
    ScaleType,
    Scheme,
    WeightFormat,
    code_dtype,
)
from ...quant.linear import StaticGrid

Layout = Literal["int-quantized", "float-quantized", "pack-quantized", "nvfp4-pack-quantized"]
FOURS: Layout = "nvfp4-pack-quantized"
_SHAPE_BYTES = 16  # weight_shape: two 64-bit numbers
_FACTOR_BYTES = 4  # weight_global_scale: float32
PLAIN, OWN = "compressed-tensors", "planish"
"""A checkpoint's quant_method. OWN where the checkpoint says more than compressed-tensors can (extension.py), has transposed layers, which its
consumers leave out, or formats that they compute otherwise (other_grid; codes packed beside quantized activations). vLLM and SGLang refuse a
quant_method that they do not know, by name; transformers logs that it does not, and goes on with random weights: that is what GUARD is for."""
TRANSPOSED, EXTENDED = "conv1d-", "planish-"
"""Stand before a format's name where the layers are transposed (transformers' Conv1D), or where there is an extension. No library has one of that
name, so one that looks at formats only refuses too."""
GUARD = "weight"
"""Local name of an empty tensor beside every quantized linear of a checkpoint of planish's own: in the place that the model has for a weight, it has
the wrong shape, so whoever loads the checkpoint as an ordinary model fails. Codes are never in that place, see default_layout."""

EXPERTS = "experts: for vLLM, or import planish first"
"""quantization_status of a mixture of experts that vLLM runs and transformers does not. vLLM does not read it. compressed-tensors, and so
transformers, knows five words there, and names this one in its error: transformers would make ordinary weights of the experts' codes, which come out
wrong or leave activations in full precision."""


@dataclass(frozen=True, slots=True)
class Packed:
    """How one linear is stored: its scheme and the layout of its codes. A clip of activations is not in compressed-tensors, see extension.py."""

    scheme: Scheme
    layout: Layout


def other_grid(act: ActivationFormat | None) -> bool:
    """Whether compressed-tensors' emulation, which transformers runs, has another grid for these activations.

    Where they are symmetric and dynamic integers it divides the largest modulus by 2^(b-1) - 1/2, servers and planish by 2^(b-1) - 1: at 8 bits that
    is within rounding, at 4 bits scales are 7 % apart.
    """
    return act is not None and act.type == "int" and act.symmetric and act.dynamic and act.bits < 8


def layouts(fmt: WeightFormat) -> tuple[Layout, ...]:
    """Those that planish reads for such weights."""
    if fmt.type == "int":
        return "int-quantized", "pack-quantized"
    return (FOURS,) if fmt.kind == NVFP4 else ("float-quantized",)


def default_layout(scheme: Scheme, *, own: bool = False) -> Layout:
    """Weight-only schemes are packed; with quantized activations codes lie one a byte, as floats of 8 bits always do.

    That is what servers' int8 kernels take; and for activations of fewer bits it is what makes vLLM refuse, where it would silently leave packed ones
    unquantized. In a checkpoint of planish's own all codes are packed.
    """
    if scheme.weights is not None and scheme.weights.type == "float":
        return layouts(scheme.weights)[0]
    return "pack-quantized" if scheme.activations is None or own else "int-quantized"


def pack(weight: QuantizedWeight, layout: Layout, scale_type: ScaleType, static: StaticGrid | None) -> dict[str, Tensor]:
    """The tensors of one linear by their local names (weight or weight_packed, weight_scale, ...)."""
    if isinstance(scale_type, Factored):
        return _pack_fours(weight, scale_type, static)
    codes, fmt, scale_dtype = weight.codes, weight.format, scale_type
    scale, zero = weight.scale.to(scale_dtype), None if weight.zero is None else weight.zero.to(torch.int8)
    whole = fmt.granularity == "tensor"  # one scale and zero point: both of shape (1,), and the library packs neither
    tensors = {"weight_scale": scale.reshape(1) if whole else scale}
    if zero is not None:
        tensors["weight_zero_point"] = zero.reshape(1) if whole else zero
    if layout != "pack-quantized":
        tensors["weight"] = codes
    else:
        tensors["weight_packed"] = pack_to_int32(codes, fmt.bits)
        tensors["weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
        if zero is not None and not whole:
            tensors["weight_zero_point"] = pack_to_int32(zero, fmt.bits, packed_dim=0)
    if static is not None:
        tensors["input_scale"] = static.scale.reshape(1).clone()  # readers of one site share it, and safetensors stores no shared memory
        if static.zero is not None:
            tensors["input_zero_point"] = static.zero.reshape(1).to(torch.int8)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _pack_fours(weight: QuantizedWeight, factored: Factored, static: StaticGrid | None) -> dict[str, Tensor]:
    """Of NVFP4; what the library calls global scales are divisors."""
    tensors = {
        "weight_packed": pack_fp4_to_uint8(weight.codes.cpu().float()).to(weight.codes.device),  # without its Triton kernel
        "weight_scale": factored.numbers(weight.scale),
        "weight_global_scale": torch.tensor([factored.factor], dtype=torch.float32),
    }
    if static is not None:
        tensors["input_global_scale"] = static.scale.reciprocal().reshape(1)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _unpack_fours(tensors: Mapping[str, Tensor], fmt: WeightFormat) -> tuple[QuantizedWeight, StaticGrid | None]:
    packed = tensors["weight_packed"]
    codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1]).to(code_dtype(fmt.kind))
    scale = tensors["weight_scale"].float() / tensors["weight_global_scale"].float().reshape(1, 1)
    static = StaticGrid(tensors["input_global_scale"].float().reciprocal().reshape(1, 1), None) if "input_global_scale" in tensors else None
    return QuantizedWeight(codes, scale, None, fmt), static


def unpack(tensors: Mapping[str, Tensor], packed: Packed) -> tuple[QuantizedWeight, StaticGrid | None]:
    """What `pack` stored, back as codes and scales."""
    fmt = packed.scheme.weights
    assert fmt is not None
    if packed.layout == FOURS:
        return _unpack_fours(tensors, fmt)
    scale = tensors["weight_scale"].float()
    scale = scale.reshape(1, 1) if fmt.granularity == "tensor" else scale
    zero = tensors.get("weight_zero_point")
    if packed.layout != "pack-quantized":
        codes = tensors["weight"]
    else:
        shape = torch.Size(int(n) for n in tensors["weight_shape"])
        codes = unpack_from_int32(tensors["weight_packed"], fmt.bits, shape)
        if zero is not None and fmt.granularity != "tensor":
            zero = unpack_from_int32(zero, fmt.bits, scale.shape, packed_dim=0)
    zero = None if zero is None else zero.float().reshape(scale.shape)
    static = None
    if "input_scale" in tensors:
        offset = tensors.get("input_zero_point")
        static = StaticGrid(tensors["input_scale"].float().reshape(1, 1), None if offset is None else offset.float().reshape(1, 1))
    return QuantizedWeight(codes, scale, zero, fmt), static


def guards(linears: Iterable[str]) -> dict[str, Tensor]:
    """The empty tensors that keep others from loading these linears, by full name. See GUARD."""
    return {f"{name}.{GUARD}": torch.empty(0, dtype=torch.uint8) for name in linears}


def is_own(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of a checkpoint that planish alone runs."""
    return quantization.get("quant_method") == OWN


def has_experts(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of a mixture of experts that transformers is kept from loading by itself, see EXPERTS."""
    return quantization.get("quantization_status") == EXPERTS


def stored_names(packed: Packed) -> tuple[str, ...]:
    """Local names of the tensors that `pack` writes for a linear stored like this."""
    fmt, act = packed.scheme.weights, packed.scheme.activations
    assert fmt is not None
    if packed.layout == FOURS:
        return ("weight_packed", "weight_scale", "weight_global_scale", *([] if act is None else ["input_global_scale"]))
    names = ["weight_scale", *(["weight_packed", "weight_shape"] if packed.layout == "pack-quantized" else ["weight"])]
    names += [] if fmt.symmetric else ["weight_zero_point"]
    if act is not None and not act.dynamic:
        names += ["input_scale", *([] if act.symmetric else ["input_zero_point"])]
    return tuple(names)


def stored_size(packed: Packed, out_channels: int, in_channels: int, scale_bytes: int) -> int:
    """Bytes of the tensors that `pack` makes of a linear's weight, without static scales. scale_bytes: of one scale."""
    fmt = packed.scheme.weights
    assert fmt is not None
    if packed.layout == FOURS:
        return out_channels * (in_channels // 2 + fmt.groups(in_channels)) + _FACTOR_BYTES
    whole, groups = fmt.granularity == "tensor", fmt.groups(in_channels)
    scales = 1 if whole else out_channels * groups
    narrow = packed.layout == "pack-quantized"
    codes = 4 * out_channels * _words(in_channels, fmt.bits) + _SHAPE_BYTES if narrow else out_channels * in_channels
    zeros = 0 if fmt.symmetric else 4 * _words(out_channels, fmt.bits) * groups if narrow and not whole else scales
    return codes + scales * scale_bytes + zeros


def _words(count: int, bits: int) -> int:
    """32-bit words for so many codes."""
    return -(-count * bits // 32)


def quantization_config(
    linears: Mapping[str, Packed], ignored: Iterable[str], *, transposed: bool = False, extended: bool = False, experts: bool = False
) -> dict[str, Any]:
    """config.json's quantization_config for these linears (by full module name); `ignored` ones stay in full precision.

    transposed: some of them are Conv1D layers, whose codes nobody but planish finds a place for; extended: an Extension goes with them; see OWN.
    experts: some are a mixture's, see EXPERTS.
    """
    groups: dict[Packed, list[str]] = {}
    for name, packed in linears.items():
        groups.setdefault(_unclipped(packed), []).append(name)
    layouts = {packed.layout for packed in groups}
    config = QuantizationConfig(
        config_groups={f"group_{i}": _scheme(packed, names, alone=len(groups) == 1) for i, (packed, names) in enumerate(groups.items())},
        format=layouts.pop() if len(layouts) == 1 else CompressionFormat.mixed_precision.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=sorted(ignored),
    )
    data: dict[str, Any] = config.model_dump(mode="json", exclude_none=False)
    data.pop("moe_sparsity_config", None)
    mark = (EXTENDED if extended else "") + (TRANSPOSED if transposed else "")
    if mark:
        data["quant_method"] = OWN
    elif experts:
        data["quantization_status"] = EXPERTS
    for part in (data, *data["config_groups"].values()):
        part["format"] = mark + part["format"]
    return data


def _unclipped(packed: Packed) -> Packed:
    act = packed.scheme.activations
    return packed if act is None or act.clip == 1 else clipped(packed, 1.0)


def made_dynamic(packed: Packed) -> Packed:
    """The same with activations dynamic per token; symmetric at 8 bits, where that is the same everywhere (other_grid)."""
    act = packed.scheme.activations
    assert act is not None
    dynamic = ActivationFormat(bits=act.bits, type=act.type, symmetric=act.bits == 8)
    return Packed(Scheme(weights=packed.scheme.weights, activations=dynamic), packed.layout)


def clipped(packed: Packed, clip: float) -> Packed:
    """The same with this clip of its activations."""
    act = packed.scheme.activations
    assert act is not None
    return Packed(Scheme(weights=packed.scheme.weights, activations=replace(act, clip=clip)), packed.layout)


def _scheme(packed: Packed, names: list[str], alone: bool) -> QuantizationScheme:
    fmt, act = packed.scheme.weights, packed.scheme.activations
    assert fmt is not None
    weights, inputs = _args(fmt, dynamic=False), None if act is None else _args(act, dynamic=act.dynamic)
    targets = ["Linear"] if alone else [f"re:^{re.escape(name)}$" for name in names]
    return QuantizationScheme(targets=targets, weights=weights, input_activations=inputs, format=CompressionFormat(packed.layout))


def _args(fmt: WeightFormat | ActivationFormat, *, dynamic: bool) -> QuantizationArgs:
    fours = fmt.kind == NVFP4
    return QuantizationArgs(
        num_bits=fmt.bits,
        type=QuantizationType(fmt.type),
        symmetric=fmt.symmetric,
        strategy=QuantizationStrategy.TENSOR_GROUP if fours else QuantizationStrategy(fmt.granularity),
        group_size=fmt.group_size,
        dynamic=DynamicType.LOCAL if fours and dynamic else dynamic,
        scale_dtype=torch.float8_e4m3fn if fours else None,
    )


def read_config(data: Mapping[str, Any], linears: Iterable[str]) -> dict[str, Packed]:
    """Which of the model's linears a quantization_config quantizes, and how. The inverse of `quantization_config`.

    Raises PlanishError for anything else that it asks for: left out, the model would compute something else. pydantic's error: it is no such config.
    """
    status = {"quantization_status": QuantizationStatus.COMPRESSED} if has_experts(data) else {}
    config = QuantizationConfig.model_validate({**_known_formats(data), "quant_method": PLAIN, **status})
    linears = list(linears)
    if (part := next(_beyond(data, config, linears), None)) is not None:
        raise PlanishError(f"quantization_config.{part}: planish runs quantized weights and inputs of linear layers alone. Give such a checkpoint.")
    ignored = config.ignore or []
    result: dict[str, Packed] = {}
    for name in linears:
        if any(_matches(name, pattern) for pattern in ignored):
            continue
        for scheme in config.config_groups.values():
            assert isinstance(scheme, QuantizationScheme)
            if any(_matches(name, target) for target in scheme.targets):
                result[name] = _packed(scheme, config.format, name)
                break
    return result


def _beyond(data: Mapping[str, Any], config: QuantizationConfig, linears: Iterable[str]) -> Iterator[str]:
    """Parts of the declaration that are not of linear layers' weights and inputs."""
    yield from (name for name in ("kv_cache_scheme", "transform_config") if data.get(name))
    for group, scheme in config.config_groups.items():
        assert isinstance(scheme, QuantizationScheme)
        if scheme.output_activations is not None:
            yield f"config_groups.{group}.output_activations"
        if not any(_matches(name, target) for name in linears for target in scheme.targets):
            yield f"config_groups.{group}.targets {scheme.targets}"


def _known_formats(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the formats' names as the library knows them."""
    part = {
        key: value.removeprefix(EXTENDED).removeprefix(TRANSPOSED) if key == "format" and isinstance(value, str) else value
        for key, value in data.items()
    }
    if isinstance(groups := part.get("config_groups"), dict):
        part["config_groups"] = {name: _known_formats(group) if isinstance(group, dict) else group for name, group in groups.items()}
    return part


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern of a config means the linear of that name."""
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern in (name, "Linear")


def _packed(scheme: QuantizationScheme, default: str, name: str) -> Packed:
    weights, inputs = scheme.weights, scheme.input_activations
    layout = str(getattr(scheme.format, "value", scheme.format) or default)
    if weights is None:
        raise PlanishError(f"{name}: its weights are not quantized, only its inputs are; planish reads layers of quantized weights.")
    fmt = WeightFormat(
        bits=weights.num_bits,
        type=_type(weights, name),
        symmetric=weights.symmetric,
        granularity=_strategy(weights, name, ("tensor", "channel", "group")),
        group_size=_group(weights),
    )
    if layout not in layouts(fmt):
        raise PlanishError(f"{name}: {fmt.name} stored as {layout}; planish reads {' and '.join(layouts(fmt))} of them.")
    act = None
    if inputs is not None:
        act = ActivationFormat(
            bits=inputs.num_bits,
            type=_type(inputs, name),
            symmetric=inputs.symmetric,
            granularity=_strategy(inputs, name, ("tensor", "token", "group")),
            group_size=_group(inputs),
            dynamic=inputs.dynamic is not False,
        )
    return Packed(Scheme(weights=fmt, activations=act), next(known for known in layouts(fmt) if known == layout))


def _type(args: QuantizationArgs, name: str) -> NumberType:
    """PlanishError for floats that are neither e4m3 nor NVFP4."""
    if args.type == "int":
        return "int"
    if args.num_bits != 8 and (args.num_bits, _strategy_name(args), args.group_size) != (4, "tensor_group", NVFP4_GROUP):
        groups = f" in groups of {args.group_size}" if _group(args) else ""
        raise PlanishError(f"{name}: floats of {args.num_bits} bits per {_strategy_name(args)}{groups}; planish runs fp8 (e4m3) and NVFP4.")
    return "float"


def _strategy(args: QuantizationArgs, name: str, known: tuple[str, ...]) -> Any:
    value = _strategy_name(args)
    if value == "tensor_group" and args.type == "float":
        return "group"
    if value not in known:
        raise PlanishError(f"{name}: strategy {value} is none of {', '.join(known)}.")
    return value


def _strategy_name(args: QuantizationArgs) -> str:
    return str(getattr(args.strategy, "value", args.strategy))


def _group(args: QuantizationArgs) -> int | None:
    return args.group_size if args.group_size and args.group_size > 0 else None
