"""A block as its checkpoint stores it, made runnable: readers become QuantizedLinear, all else takes the stored values."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..quant.linear import QuantizedLinear
from ..quant.transforms.factors import Chain
from .packing import Packed, stored_names, unpack


def quantized_readers(
    prefix: str, tensors: Mapping[str, Tensor], packed: Mapping[str, Packed], chains: Mapping[str, Chain], dtype: torch.dtype
) -> dict[str, nn.Module]:
    """The quantized linears under `prefix` (a block's full name), by their path inside it. chains: what inputs go through, by full name."""
    layers: dict[str, nn.Module] = {}
    for name, how in packed.items():
        if not name.startswith(prefix + "."):
            continue
        weight, static = unpack({local: tensors[f"{name}.{local}"] for local in stored_names(how)}, how)
        bias, chain = tensors.get(f"{name}.bias"), chains.get(name, ())
        layers[name.removeprefix(prefix + ".")] = QuantizedLinear(weight, bias, how.scheme.activations, static, chain, dtype)
    return layers


def load_rest(block: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy the stored full-precision tensors (norms, layers left alone, biases) into the block's own parameters."""
    for name, parameter in block.named_parameters():
        stored = tensors.get(f"{prefix}.{name}")
        if stored is not None and stored.is_floating_point():
            parameter.data.copy_(stored)
