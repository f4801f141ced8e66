"""Which tensor of a checkpoint is which parameter of the model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, rename_source_key

from ...quant.errors import PlanishError
from ..blocks.families import name_in_model
from ..blocks.family import EXPERTS
from .shards import CHUNK_BYTES, TensorInfo, read_chunks

READABLE = (torch.bfloat16, torch.float16, torch.float32)
# Buffers that older versions stored and that the model computes itself.
LEFTOVERS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias", "attention.masked_bias", "attention.bias", "position_ids")
# Last parts of the names that packed and scaled weights have in the checkpoints of the known quantizers.
QUANTIZED = {"qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "SCB", "quant_map", "absmax"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """The fields of Checkpoint of the same names. untied: the configuration ties parameters that the files store with different values."""

    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    unused: tuple[str, ...]
    untied: bool


def match_names(folder: Path, stored: Mapping[str, TensorInfo], skeleton: PreTrainedModel) -> Match:
    """Find each parameter and buffer of the model among the stored tensors.

    Errors: quantized weights, a parameter that is missing, another shape than the configuration says, a dtype other than READABLE.
    """
    expected = skeleton.state_dict()
    _refuse_quantized(stored)
    tensors = {name: info for name, info in stored.items() if name in expected}
    unused = []
    convert = _conversions(skeleton, expected)
    for name in sorted(stored.keys() - tensors.keys()):
        target = next((other for other in _other_names(name, skeleton) if other in expected and other not in tensors), None)
        parts = convert(name, stored[name]) if target is None else {target: stored[name]}
        if parts and not parts.keys() & tensors.keys():
            tensors |= parts
        elif not name.endswith(LEFTOVERS):
            unused.append(name)
    aliases = _tie(tensors, skeleton.all_tied_weights_keys)
    missing = [name for name, _ in skeleton.named_parameters() if name not in tensors and name not in aliases]
    if missing:
        raise PlanishError(f"{folder}: the weights lack {_listed(missing)}, which {type(skeleton).__name__} needs. {_hint(unused)}")
    for name, info in sorted(tensors.items()):
        if info.shape != tuple(expected[name].shape):
            where = f"{info.file}: tensor {info.name} has shape {info.shape}, but config.json makes it {tuple(expected[name].shape)}"
            raise PlanishError(f"{where}. The configuration and the weights belong to different models.")
        if info.dtype not in READABLE:
            dtype = str(info.dtype).removeprefix("torch.")
            raise PlanishError(f"{info.file}: tensor {info.name} has dtype {dtype}; planish compresses bfloat16, float16 and float32 weights.")
    untied = any(target in tensors for target in skeleton.all_tied_weights_keys)
    return Match(tensors=dict(sorted(tensors.items())), aliases=aliases, unused=tuple(unused), untied=untied)


def named_in_model(stored: Mapping[str, TensorInfo], skeleton: PreTrainedModel) -> dict[str, TensorInfo]:
    """The stored tensors by the names of the model's parameters that transformers makes of them; others by their own."""
    expected = skeleton.state_dict()
    convert, named = _conversions(skeleton, expected), dict[str, TensorInfo]()
    for name, info in stored.items():
        named |= (None if name in expected else convert(name, info)) or {name: info}
    return named


def _other_names(name: str, skeleton: PreTrainedModel) -> Iterator[str]:
    """What the model may call a tensor that it does not know by its stored name."""
    base, known = skeleton.base_model_prefix, name_in_model(skeleton.config.model_type, name)
    yield known
    yield f"{base}.{known}"
    yield name.removeprefix(f"{base}.")
    # GPT-NeoX's head, which transformers 5 renamed in the model but not in the files.
    yield name.replace("embed_out.", "lm_head.", 1)


def _conversions(skeleton: PreTrainedModel, expected: Mapping[str, Tensor]) -> Callable[[str, TensorInfo], dict[str, TensorInfo]]:
    """What transformers makes of a stored tensor whose name the model does not have: its parameters by name; none where it is not a plain renaming
    or a cut into equal parts along the rows."""

    @cache
    def transforms() -> tuple[list[WeightRenaming], list[WeightConverter]]:
        known = get_model_conversion_mapping(skeleton)
        return [t for t in known if isinstance(t, WeightRenaming)], [t for t in known if isinstance(t, WeightConverter)]

    def convert(name: str, info: TensorInfo) -> dict[str, TensorInfo]:
        renamings, converters = transforms()
        first, source = rename_source_key(name, renamings, converters, skeleton.base_model_prefix, dict(expected))
        if source is None:
            parts = _experts(first, info) or {first: info}
        else:
            converter = next(t for t in converters if source in t.source_patterns)
            parts = _rows(first, info, converter) if info.shape and _cuts_rows(converter) else {}
        return parts if parts.keys() <= expected.keys() else {}

    return convert


def _experts(name: str, info: TensorInfo) -> dict[str, TensorInfo]:
    """The layers of all experts whose weights lie in one tensor (E, O, I), as transformers has them; none for another tensor."""
    path, _, kind = name.rpartition(".")
    layers = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind, ())
    if not path.endswith(f".{EXPERTS}") or len(info.shape) != 3 or info.shape[1] % max(1, len(layers)):
        return {}
    count, rows, width = info.shape
    shape = rows // len(layers), width
    size = prod(shape) * info.dtype.itemsize
    parts = [f"{path}.{number}.{layer}.weight" for number in range(count) for layer in layers]
    return {part: replace(info, shape=shape, offset=info.offset + index * size) for index, part in enumerate(parts)}


def _cuts_rows(converter: WeightConverter) -> bool:
    return [type(step) is Chunk and step.dim == 0 for step in converter.operations] == [True]


def _rows(first: str, info: TensorInfo, converter: WeightConverter) -> dict[str, TensorInfo]:
    """Equal parts of a tensor along its first dimension, one for each target of the converter; they are whole ranges of its bytes."""
    targets = converter.target_patterns
    shape = (info.shape[0] // len(targets), *info.shape[1:])
    size = prod(shape) * info.dtype.itemsize
    return {first.replace(targets[0], target): replace(info, shape=shape, offset=info.offset + i * size) for i, target in enumerate(targets)}


def _tie(tensors: dict[str, TensorInfo], pairs: Mapping[str, str]) -> dict[str, str]:
    """Tied parameters that need no tensor of their own. `tensors` loses copies of a tied tensor, and has the one left under the source's name."""
    aliases = {}
    for target, source in pairs.items():
        if target in tensors and source not in tensors:
            tensors[source] = tensors.pop(target)
        if source in tensors and (target not in tensors or _same(tensors[target], tensors[source])):
            tensors.pop(target, None)
            aliases[target] = source
    return aliases


def _same(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two stored tensors are equal bit for bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    buffers = torch.empty(2, CHUNK_BYTES, dtype=torch.uint8)
    pieces = zip(read_chunks(one, buffers[0]), read_chunks(other, buffers[1]), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pieces)


def _refuse_quantized(stored: Mapping[str, TensorInfo]) -> None:
    for name, info in stored.items():
        last = name.rpartition(".")[2]
        if last in QUANTIZED or (last == "weight" and info.dtype.itemsize == 1):
            dtype = str(info.dtype).removeprefix("torch.")
            message = f"tensor {name} ({dtype}) belongs to a quantized model. Give the original model in bfloat16, float16 or float32"
            raise PlanishError(f"{info.file}: {message}.")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _hint(unused: list[str]) -> str:
    if not unused:
        return "Download the checkpoint again."
    return f"It has {_listed(unused)}, which the model has no place for: config.json may belong to another model."
