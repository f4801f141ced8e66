"""A stored model's linears on the kernels that are made for them: packed where the operators compute them, the readers of one input as one product.

What the operators do not compute (QuantizedLinear says what there is) stays as it was measured; `kernels_of` tells which is which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calib.checkpoint import Checkpoint
from .calib.quantized import put
from .calib.stored import StoredCheckpoint
from .calib.topology import topology
from .quant.formats import ActivationFormat, QuantizedWeight
from .quant.kernels import PackedLinear
from .quant.kernels.together import Product, Together, stacked
from .quant.linear import QuantizedLinear, Side, StaticGrid, share_input
from .quant.transforms.factors import Chain


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a quantized linear is made of: the arguments of QuantizedLinear."""

    weight: QuantizedWeight
    bias: Tensor | None
    activations: ActivationFormat | None
    static: StaticGrid | None
    chain: Chain
    dtype: torch.dtype
    side: Side | None

    @property
    def packs(self) -> bool:
        """Whether the operators compute it."""
        return PackedLinear.supports(self.weight, self.activations, self.side)

    def layer(self) -> PackedLinear | QuantizedLinear:
        """As a module."""
        kind = PackedLinear if self.packs else QuantizedLinear
        return kind(self.weight, self.bias, self.activations, self.static, self.chain, self.dtype, self.side)


def load_packed(model: nn.Module, checkpoint: StoredCheckpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Load the whole model, a skeleton so far."""
    for name in checkpoint.packed:
        put(model, name, nn.Identity())  # whose weights are not among what is loaded now
    Checkpoint.load_module(checkpoint, model, "", dtype=dtype, device=device)
    known = topology(checkpoint.config)
    sites: dict[object, list[str]] = {}
    for name in checkpoint.packed:
        address = known.address(name)
        sites.setdefault(name if address is None else (address[0], address[1].name), []).append(name)
    for names in sites.values():
        for name, layer in _readers(checkpoint.quantized(names, dtype, device, Parts)).items():
            put(model, name, layer)


def _readers(parts: Mapping[str, Parts]) -> dict[str, nn.Module]:
    """The readers of one input, as one product where they can be."""
    layers = together(list(parts.values()))
    if len(layers) == len(parts):
        return dict(zip(parts, layers, strict=True))
    product = Product(layers[0], [len(part.weight.codes) for part in parts.values()])
    return {name: Together(product, index) for index, name in enumerate(parts)}


def together(parts: Sequence[Parts]) -> list[PackedLinear | QuantizedLinear]:
    """Linears of one input: one that computes them all below one another where that can be, else each."""
    one = joined(parts)
    if one is not None:
        return [one.layer()]
    layers = [part.layer() for part in parts]
    share_input([layer for layer in layers if isinstance(layer, QuantizedLinear)])
    return layers


def joined(parts: Sequence[Parts]) -> Parts | None:
    """All in one; None where there is but one, or they are not alike."""
    first = parts[0]
    weight = stacked([part.weight for part in parts])
    alike = all(part.packs and part.side is None and part.activations == first.activations and _same(part.static, first.static) for part in parts)
    if len(parts) < 2 or weight is None or not alike:
        return None
    biases = [torch.zeros(len(p.weight.codes), device=p.weight.codes.device) if p.bias is None else p.bias.float() for p in parts]
    bias = None if all(part.bias is None for part in parts) else torch.cat(biases)
    return Parts(weight, bias, first.activations, first.static, first.chain, first.dtype, None)


def _same(one: StaticGrid | None, other: StaticGrid | None) -> bool:
    if one is None or other is None:
        return one is other
    zeros = one.zero is other.zero if one.zero is None or other.zero is None else torch.equal(one.zero, other.zero)
    return torch.equal(one.scale, other.scale) and zeros


def kernels_of(model: nn.Module) -> dict[str, int]:
    """How many quantized linears run packed, how many of these as part of a product of several, and how many as they were measured."""
    modules = list(model.modules())
    together = [module for module in modules if isinstance(module, Together)]
    products = {module.product.linear for module in together}
    alone = sum(isinstance(module, PackedLinear) and module not in products for module in modules)
    reference = sum(isinstance(module, QuantizedLinear) for module in modules)
    return {"packed": alone + len(together), "together": len(together), "reference": reference}
