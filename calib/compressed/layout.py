"""What config.json declares against the headers of the weight files: names, dtypes and shapes, no values.

A linear has N outputs and K inputs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...quant.errors import PlanishError
from ...quant.formats import WeightFormat, code_dtype
from ...quant.transforms.factors import Chain, on_input
from ..blocks.families import name_in_files, name_in_model
from ..blocks.multimodal import MULTIMODAL
from ..blocks.prefix import tensor_names
from ..blocks.sites import Site
from ..blocks.topology import topology
from ..files.checkpoint import build_skeleton
from ..files.convert import REJECTED
from ..files.locate import weight_files
from ..files.naming import LEFTOVERS, named_in_model
from ..files.shards import TensorInfo, read_json, read_shards
from .extension import KEY, Extension, SiteInput, chain_prefix, restored
from .packing import FOURS, GUARD, OWN, PLAIN, Packed, is_own, read_config, stored_names
from .side import FLOATS, expected_tensors, side_name

MARK = ".planish."  # in the names of tensors that only planish knows


@dataclass(frozen=True, slots=True)
class Layout:
    """A compressed checkpoint as it lies on disk, nothing of it checked yet.

    config: without its quantization_config. linears: (N, K) of every linear layer by name. packed: how those that are declared quantized should be
    stored. extension: what else is declared. own: planish alone runs it.
    """

    folder: Path
    config: PreTrainedConfig
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
        found = "the model is not compressed: there is no quantization_config"
        found = f"quantization_config is {quantization!r:.120}" if quantization else found
        raise PlanishError(f"{folder / 'config.json'}: {found}. Give a compressed-tensors checkpoint, such as planish writes.")
    return quantization


def read_layout(folder: Path) -> Layout:
    """Read config.json and the headers of the weight files. Errors: they are broken, or the format is one that planish does not read."""
    quantization, file = declared(folder), folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except REJECTED as error:
        raise PlanishError(f"{file}: transformers does not take it: {error}") from error
    assert isinstance(config, PreTrainedConfig)
    vars(config).pop("quantization_config")
    skeleton = build_skeleton(config, torch.float32, folder)
    linears, kind = linear_shapes(skeleton), config.model_type
    tensors = {name_in_model(kind, name): info for name, info in read_shards(weight_files(folder)).items()}
    if kind in MULTIMODAL:  # what is outside the language model has the names of the original files
        tensors = named_in_model(tensors, skeleton)
    try:
        declared_as = {name_in_files(kind, name): name for name in linears}
        packed = {declared_as[name]: how for name, how in read_config(quantization, declared_as).items()}
    except ValidationError as error:
        raise PlanishError(f"{file}: quantization_config: {error}") from error
    return Layout(folder, config, tensors, skeleton, linears, packed, Extension.read(read_json(file)), is_own(quantization))


def linear_shapes(skeleton: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(N, K) of every linear layer of the model, by name."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.weight.shape[1], module.weight.shape[0])
    return found


def header_faults(layout: Layout) -> Iterator[str]:
    """What is missing, has another dtype or shape than it is declared to have, or has no place in the model. Reads no file."""
    yield from _quantized_faults(layout)
    yield from _plain_faults(layout)
    yield from _extension_faults(layout)
    yield from _unexpected(layout)


def placed(layout: Layout) -> Iterator[tuple[str, SiteInput, str, Site]]:
    """The sites that something is said of: address, what is said, the block's full name, the site. Addresses that the model has not are left out."""
    if not layout.extension:
        return
    known = topology(layout.config)
    sites = {f"{index}.{name}": (index, name) for index, name in known.addresses}
    for address, site_input in layout.extension.sites.items():
        if address in sites:
            index, name = sites[address]
            yield address, site_input, known.block_name(index), known.block(index).site(name)


def fitting(site_input: SiteInput, block: str, site: str, tensors: Mapping[str, Tensor], width: int) -> Chain:
    """The chain of a site, of so many channels. tensors: of the block, by full name. PlanishError where it cannot be made, or does not fit them."""
    try:
        chain = restored(site_input, block, site, tensors)
        on_input(chain, torch.zeros(1, width, device=next((tensor.device for tensor in tensors.values()), None)))
    except PlanishError as error:
        raise PlanishError(f"{block}, {site}: {error}") from error
    except (RuntimeError, IndexError) as error:
        raise PlanishError(f"{block}, {site}: its transform does not fit {width} channels ({error}). Compress again.") from error
    return chain


def weight_format(how: Packed) -> WeightFormat:
    """Of a quantized linear's codes."""
    assert how.scheme.weights is not None
    return how.scheme.weights


def _quantized_faults(layout: Layout) -> Iterator[str]:
    for name, how in layout.packed.items():
        size, inputs = weight_format(how).group_size, layout.linears[name][1]
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


def _expected(how: Packed, local: str, n: int, k: int) -> tuple[tuple[torch.dtype, ...], tuple[tuple[int, ...], ...]]:
    """Possible dtypes and shapes of a quantized linear's tensor."""
    fmt = weight_format(how)
    groups = fmt.groups(k)
    scales: tuple[tuple[int, ...], ...] = ((1,), (1, 1), ()) if fmt.granularity == "tensor" else ((n, groups),)
    packed = how.layout == "pack-quantized" and fmt.granularity != "tensor"
    match local:
        case "weight":
            return (code_dtype(fmt.kind),), ((n, k),)
        case "weight_packed" if how.layout == FOURS:
            return (torch.uint8,), ((n, k // 2),)
        case "weight_scale" if how.layout == FOURS:
            return (torch.float8_e4m3fn,), ((n, groups),)
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
    """Of what is declared beyond compressed-tensors: sites that there are not, side paths, a prefix that is not there."""
    if not layout.extension:
        return
    known, there = topology(layout.config), {address for address, *_ in placed(layout)}
    yield from (f"config.json: {KEY}.sites has {one}, which the model has not" for one in layout.extension.sites if one not in there)
    for _, site_input, block, site in placed(layout):
        yield from _side_faults(layout, site_input, block, site.readers)
    if layout.extension.prefix:
        names = [tensor for index in range(known.block_count) for tensor in tensor_names(known.block_name(index))]
        yield from (f"{tensor} is missing, but config.json declares a prefix" for tensor in names if tensor not in layout.tensors)


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


def _extra_names(layout: Layout) -> set[str]:
    """Tensors that belong to the declared extension: of chains, of side paths, of the prefix, and biases that shifts make."""
    if not layout.extension:
        return set()
    known, names, chains = topology(layout.config), set[str](), set[str]()
    for _, site_input, block, site in placed(layout):
        chains.add(chain_prefix(block, site.name))
        names |= {f"{block}.{path}.bias" for path in site.readers if any(factor.get("kind") == "shift" for factor in site_input.chain)}
        names |= {side_name(f"{block}.{path}", local) for path in site.readers for local in expected_tensors(site_input, path, 0, 0)}
    names |= {tensor for tensor in layout.tensors if _chain_start(tensor) in chains}
    if layout.extension.prefix:
        names |= {tensor for index in range(known.block_count) for tensor in tensor_names(known.block_name(index))}
    return names


def _chain_start(tensor: str) -> str:
    """The chain_prefix that a chain's tensor of this name has."""
    block, mark, rest = tensor.partition(MARK)
    return f"{block}{mark}{rest.partition('.')[0]}."


def _unexpected(layout: Layout) -> Iterator[str]:
    known = {*layout.skeleton.state_dict(), *layout.skeleton.all_tied_weights_keys} - {f"{name}.weight" for name in layout.packed}
    known |= {f"{name}.{local}" for name, how in layout.packed.items() for local in stored_names(how)} | _extra_names(layout)
    known |= {f"{name}.{GUARD}" for name in layout.packed if layout.own}
    yield from (f"{name} is unexpected" for name in sorted(layout.tensors) if name not in known and not name.endswith(LEFTOVERS))


def _describe(how: Packed) -> str:
    fmt = weight_format(how)
    return f"{how.layout} with {fmt.bits}-bit weights per {f'group of {fmt.group_size}' if fmt.group_size else fmt.granularity}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
