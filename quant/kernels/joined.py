"""The readers of one input as one product: q, k and v, gate and up. The input is quantized once, and one large product is quicker than small ones.

Shape suffixes: T tokens, I in channels, O out channels, N those of all readers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight
from ..linear import Parts, StaticGrid
from .modules import PackedLinear


def joinable(parts: Sequence[Parts]) -> bool:
    """Whether these readers of one input can be one product: quantized alike, nothing beside the codes."""
    first = parts[0]
    return all(
        other.side is None
        and other.weight.format == first.weight.format
        and other.weight.scale.shape[1] == first.weight.scale.shape[1]
        and (other.activations, other.dtype) == (first.activations, first.dtype)
        and (other.chain is first.chain or not (other.chain or first.chain))
        and _same(other.static, first.static)
        for other in parts
    )


def _same(one: StaticGrid | None, other: StaticGrid | None) -> bool:
    grids = [[] if grid is None else [x for x in (grid.scale, grid.zero) if x is not None] for grid in (one, other)]
    return len(grids[0]) == len(grids[1]) and all(map(torch.equal, *grids))


def join(parts: Sequence[Parts]) -> Parts:
    """The parts of the one linear (N, I) whose output is that of all these, side by side."""
    first, weights = parts[0], [part.weight for part in parts]
    sizes = [len(weight.codes) for weight in weights]
    scale = torch.cat([weight.scale.expand(size, -1) for weight, size in zip(weights, sizes, strict=True)])
    zeros = [weight.zero.expand(size, -1) for weight, size in zip(weights, sizes, strict=True) if weight.zero is not None]
    joined = QuantizedWeight(torch.cat([weight.codes for weight in weights]), scale, torch.cat(zeros) if zeros else None, first.weight.format)
    biases = [scale.new_zeros(size) if part.bias is None else part.bias.to(scale) for part, size in zip(parts, sizes, strict=True)]
    return first._replace(weight=joined, bias=torch.cat(biases) if any(part.bias is not None for part in parts) else None)


class JoinedLinear(nn.Module):
    """One PackedLinear (N, I) for several readers, which stand in the model as `part(0)`, `part(1)` and so on."""

    def __init__(self, parts: Sequence[Parts]) -> None:
        super().__init__()
        self.linear = PackedLinear(*join(parts))
        self.sizes = [len(part.weight.codes) for part in parts]
        self._made: tuple[Tensor, int, tuple[Tensor, ...], int] | None = None

    def part(self, index: int) -> "Part":
        """The reader of this place."""
        return Part(self, index)

    def of(self, x: Tensor, index: int) -> Tensor:
        """What reader `index` makes of x (..., I): (..., O). The product is made for the first that asks, and let go when the last has had its part.

        The same x is the same object, unchanged since.
        """
        made, version = self._made, 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        if made is None or made[0] is not x or made[1] != version:
            made = (x, version, self.linear(x).split(self.sizes, -1), len(self.sizes))
        self._made = None if made[3] <= 1 else (made[0], made[1], made[2], made[3] - 1)
        return made[2][index]

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without the input at hand."""
        return {**self.__dict__, "_made": None}


class Part(nn.Module):
    """One reader of a joined product: y = Q(x T) Ŵᵀ + b for x (..., I), as a PackedLinear of its own would give."""

    def __init__(self, joined: JoinedLinear, index: int) -> None:
        super().__init__()
        self.joined, self.index = joined, index
        self.in_features, self.out_features = joined.linear.in_features, joined.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) in the layer's dtype. Returns (..., O), a view into the product of all."""
        return self.joined.of(x, self.index)
