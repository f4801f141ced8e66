"""A block as its checkpoint stores it, made runnable: readers become QuantizedLinear, all else takes the stored values."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...quant.linear import Parts, QuantizedLinear
from ...quant.transforms.factors import Chain
from .extension import SiteInput
from .packing import Packed, stored_names, unpack
from .side import restored_side, side_names


def quantized_readers(
    prefix: str,
    tensors: Mapping[str, Tensor],
    packed: Mapping[str, Packed],
    chains: Mapping[str, Chain],
    inputs: Mapping[str, SiteInput],
    dtype: torch.dtype,
) -> dict[str, QuantizedLinear]:
    """The quantized linears under `prefix` (a block's full name), by their path inside it.

    chains: what inputs go through, inputs: what is said of them, both by full name.
    """
    names = [name for name in packed if name.startswith(prefix + ".")]
    parts = {name: stored_parts(name, tensors, packed[name], chains, inputs, dtype) for name in names}
    return {name.removeprefix(prefix + "."): QuantizedLinear(*found) for name, found in parts.items()}


def stored_parts(
    name: str, tensors: Mapping[str, Tensor], how: Packed, chains: Mapping[str, Chain], inputs: Mapping[str, SiteInput], dtype: torch.dtype
) -> Parts:
    """What the quantized linear of this full name is made of."""
    weight, static = unpack({local: tensors[f"{name}.{local}"] for local in stored_names(how)}, how)
    what = inputs.get(name, SiteInput())
    beside = {local: tensors[full] for local, full in side_names(name, tensors).items()} if what else {}
    side = restored_side(beside, what, how.scheme)
    return Parts(weight, tensors.get(f"{name}.bias"), how.scheme.activations, static, chains.get(name, ()), dtype, side)


def put(block: nn.Module, path: str, module: nn.Module) -> None:
    """Let `module` stand at `path` of the block."""
    parent, _, child = path.rpartition(".")
    setattr(block.get_submodule(parent), child, module)


def load_rest(block: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy the stored full-precision tensors (norms, layers left alone, biases) into the block's own parameters."""
    for name, parameter in block.named_parameters():
        stored = tensors.get(f"{prefix}.{name}")
        if stored is not None and stored.is_floating_point():
            parameter.data.copy_(stored)
