"""Linears that read one input, as one product: its quantization and its pass over the input are paid for once.

The readers stay where the model has them. Whichever is called first computes all and leaves the others theirs; the last one called lets go of them. A
reader that is given something else than the first was computes anew, so nothing hangs on the order or number of calls.

Shape suffixes: O out channels, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight


def stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """The weights below one another; None where their formats differ."""
    first = weights[0]
    alike = all(w.format == first.format and w.scale.shape[1] == first.scale.shape[1] and (w.zero is None) == (first.zero is None) for w in weights)
    if not alike:
        return None
    scale = torch.cat([w.scale.expand(len(w.codes), -1) for w in weights])
    zeros = [w.zero.expand(len(w.codes), -1) for w in weights if w.zero is not None]
    return QuantizedWeight(torch.cat([w.codes for w in weights]), scale, torch.cat(zeros) if zeros else None, first.format)


@dataclass(slots=True, eq=False)
class _Made:
    """What the product made, of the input it was given; left: how many readers have not had theirs."""

    x: Tensor
    parts: tuple[Tensor, ...]
    left: int


class Product(nn.Module):
    """The product of all readers. sizes: their outputs, in order."""

    def __init__(self, linear: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear, self.sizes = linear, tuple(sizes)
        self.made: _Made | None = None

    def part(self, x: Tensor, index: int) -> Tensor:
        """Of reader `index`."""
        made = self.made
        if made is None or made.x is not x:
            made = self.made = _Made(x, self.linear(x).split(self.sizes, -1), len(self.sizes))
        made.left -= 1
        if made.left == 0:
            self.made = None
        return made.parts[index]

    def __getstate__(self) -> dict[str, object]:
        """For copies: without what is at hand."""
        return {**self.__dict__, "made": None}


class Together(nn.Module):
    """Reader `index` of a product: y (..., O) of x (..., I)."""

    def __init__(self, product: Product, index: int) -> None:
        super().__init__()
        self.product, self.index = product, index
        self.out_features = product.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) in the layer's dtype. Returns (..., O), a view."""
        return self.product.part(x, self.index)
