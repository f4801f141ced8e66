"""The readers of one input as one product: each gets what a PackedLinear of its own makes."""

import copy

import pytest
import torch
from torch import Tensor

from planish.quant.formats import ActivationFormat, QuantizedWeight, WeightFormat
from planish.quant.kernels import JoinedLinear, PackedLinear
from planish.quant.kernels.joined import joinable
from planish.quant.linear import Parts, Side, StaticGrid
from planish.quant.low_rank import LowRank
from planish.quant.transforms.factors import Chain, Hadamard

EIGHT = ActivationFormat(bits=8)
STATIC = ActivationFormat(bits=8, granularity="tensor", dynamic=False, symmetric=False)
FORMS: dict[str, tuple[WeightFormat, ActivationFormat | None]] = {
    "w8a8": (WeightFormat(bits=8), EIGHT),
    "per tensor": (WeightFormat(bits=8, granularity="tensor"), EIGHT),
    "static": (WeightFormat(bits=8), STATIC),
    "w4a4": (WeightFormat(bits=4), ActivationFormat(bits=4, symmetric=False, clip=0.9)),
    "w4 asymmetric": (WeightFormat(bits=4, symmetric=False), ActivationFormat(bits=8, symmetric=False)),
    "w4a16": (WeightFormat(bits=4, granularity="group", group_size=32), None),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts(name: str, out: int, seed: int, dtype: torch.dtype = torch.bfloat16, bias: bool = True, chain: Chain = ()) -> Parts:
    fmt, activations = FORMS[name]
    top, g = 1 << fmt.bits - 1, torch.Generator().manual_seed(seed)
    shape = (1 if fmt.granularity == "tensor" else out, fmt.groups(64))
    scale = (torch.rand(shape, generator=g) * 0.01 + 0.01).bfloat16().float()
    zero = None if fmt.symmetric else torch.randint(-top, top, shape, generator=g).float()
    weight = QuantizedWeight(torch.randint(-top, top, (out, 64), generator=g).to(torch.int8), scale, zero, fmt)
    static = StaticGrid(torch.full((1, 1), 0.02), torch.full((1, 1), 3.0)) if activations is STATIC else None
    return Parts(weight, draw(out, seed=seed) if bias else None, activations, static, chain, dtype, None)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_is_each_alone(name: str, dtype: torch.dtype, tokens: int) -> None:
    chain = (Hadamard(64, draw(64).sign()),)
    made = [parts(name, out, seed, dtype, bias, chain) for seed, (out, bias) in enumerate([(48, True), (16, False), (32, True)])]
    assert joinable(made)
    joined, x = JoinedLinear(made), draw(2, tokens, 64, seed=9).to(dtype)
    for index, one in enumerate(made):
        found, twin = joined.part(index)(x), PackedLinear(*one)(x)
        assert found.shape == twin.shape
        torch.testing.assert_close(found, twin, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_one_product_for_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = JoinedLinear([parts("w8a8", 16, 0), parts("w8a8", 32, 1)])
    one, two, calls = joined.part(0), joined.part(1), list[Tensor]()
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: (calls.append(x), forward(self, x))[1])
    x = draw(5, 64).bfloat16()
    first = [two(x), one(x)]
    assert len(calls) == 1
    assert joined._made is None
    x.mul_(2)
    assert not torch.equal(one(x), first[1])  # the same object, changed
    one(x.clone())
    assert len(calls) == 3
    copied = copy.deepcopy(joined)
    assert copied._made is None
    assert torch.equal(copied.part(1)(x), two(x))


def test_what_cannot_be_joined() -> None:
    one = parts("w8a8", 16, 0)
    low = Side(LowRank(draw(2, 64), draw(16, 2)))
    assert joinable([one, parts("w8a8", 32, 1)])
    assert not joinable([one, parts("w4a4", 16, 1)])
    assert not joinable([one, one._replace(side=low)])
    assert not joinable([one, one._replace(chain=(Hadamard(64),))])
    assert not joinable([one, one._replace(dtype=torch.float32)])
    static = parts("static", 16, 0)
    assert joinable([static, parts("static", 32, 1)])
    assert not joinable([static, static._replace(static=StaticGrid(torch.full((1, 1), 0.03), torch.full((1, 1), 3.0)))])
    assert not joinable([static, static._replace(static=None)])


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    joined = JoinedLinear([parts("w8a8", 16, 0), parts("w8a8", 32, 1)])
    one, two, x = joined.part(0), joined.part(1), draw(5, 64).bfloat16()

    def both(x: Tensor) -> Tensor:
        return torch.cat([one(x), two(x)], -1)

    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x), rtol=2e-2, atol=2e-2)
    assert joined._made is None
