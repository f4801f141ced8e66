"""Readers of one input as one product: each gets what it would compute by itself, however they are called."""

import copy

import pytest
import torch
from torch import Tensor, nn

from planish.quant.formats import QuantizedWeight, WeightFormat
from planish.quant.kernels.together import Product, Together, stacked

SIZES = (3, 5, 2)


class Counted(nn.Module):
    """A linear that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(sum(SIZES), 4, generator=torch.Generator().manual_seed(0)))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., 4)."""
        self.calls += 1
        return x @ self.weight.T


def readers() -> tuple[Counted, list[Together]]:
    linear = Counted()
    product = Product(linear, SIZES)
    return linear, [Together(product, index) for index in range(len(SIZES))]


def expected(linear: Counted, x: Tensor, index: int) -> Tensor:
    return (x @ linear.weight.T).split(SIZES, -1)[index]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_one_product_for_all(order: tuple[int, ...]) -> None:
    linear, parts = readers()
    for run in range(2):
        x = torch.randn(2, 3, 4)
        for index in order:
            assert torch.equal(parts[index](x), expected(linear, x, index))
        assert linear.calls == run + 1
        assert parts[0].product.made is None  # nothing is held
    assert [part.out_features for part in parts] == list(SIZES)


def test_another_input_is_computed_anew() -> None:
    linear, parts = readers()
    one, two = torch.randn(3, 4), torch.randn(3, 4)
    parts[0](one)
    assert torch.equal(parts[1](two), expected(linear, two, 1))
    assert torch.equal(parts[1](one.clone()), expected(linear, one, 1))
    assert linear.calls == 3


def test_a_copy_is_on_its_own() -> None:
    linear, parts = readers()
    x = torch.randn(3, 4)
    parts[0](x)
    twin = copy.deepcopy(nn.ModuleList(parts))
    assert twin[1].product is twin[0].product is not parts[0].product
    assert torch.equal(twin[1](x), expected(linear, x, 1))
    assert linear.calls == 1


def weight(rows: int, bits: int = 4, groups: int = 1, zero: bool = False) -> QuantizedWeight:
    codes = torch.randint(-8, 8, (rows, 8)).to(torch.int8)
    scale = torch.rand(rows, groups)
    size = None if groups == 1 else 8 // groups
    fmt = WeightFormat(bits=bits, granularity="group" if size else "channel", group_size=size, symmetric=not zero)
    return QuantizedWeight(codes, scale, torch.randint(-8, 8, (rows, groups)).to(torch.int8) if zero else None, fmt)


@pytest.mark.parametrize(("groups", "zero"), [(1, False), (2, False), (2, True)])
def test_weights_below_one_another(groups: int, zero: bool) -> None:
    parts = [weight(rows, groups=groups, zero=zero) for rows in SIZES]
    whole = stacked(parts)
    assert whole is not None
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_formats_that_differ_do_not_stack() -> None:
    assert stacked([weight(3), weight(3, bits=8)]) is None
    assert stacked([weight(3), weight(3, groups=2)]) is None
