"""PackedLinear computes what QuantizedLinear does, in every form that it supports, plain and compiled."""

import copy

import pytest
import torch
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, QuantizedWeight, WeightFormat
from planish.quant.kernels import PackedLinear, cpu, tiles
from planish.quant.linear import Kept, QuantizedLinear, Side, StaticGrid
from planish.quant.low_rank import LowRank
from planish.quant.transforms.factors import Chain, Hadamard, Scale

FORMS: dict[str, tuple[WeightFormat, ActivationFormat | None]] = {
    "w8a8": (WeightFormat(bits=8), ActivationFormat(bits=8)),
    "w8a8 per tensor": (WeightFormat(bits=8, granularity="tensor"), ActivationFormat(bits=8, granularity="tensor", symmetric=False)),
    "w8a8 static": (WeightFormat(bits=8), ActivationFormat(bits=8, granularity="tensor", dynamic=False, symmetric=False)),
    "w4a8": (WeightFormat(bits=4), ActivationFormat(bits=8, symmetric=False)),
    "w4a8 asymmetric": (WeightFormat(bits=4, symmetric=False), ActivationFormat(bits=8, symmetric=False)),
    "w4a4": (WeightFormat(bits=4), ActivationFormat(bits=4, symmetric=False, clip=0.9)),
    "w4a16": (WeightFormat(bits=4), None),
    "w4a16 grouped": (WeightFormat(bits=4, granularity="group", group_size=32), None),
    "w4a16 asymmetric": (WeightFormat(bits=4, granularity="group", group_size=16, symmetric=False), None),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(fmt: WeightFormat, out: int = 32, inputs: int = 64) -> QuantizedWeight:
    top, g = 1 << fmt.bits - 1, torch.Generator().manual_seed(1)
    shape = (1 if fmt.granularity == "tensor" else out, fmt.groups(inputs))
    scale = (torch.rand(shape, generator=g) * 0.01 + 0.01).bfloat16().float()
    zero = None if fmt.symmetric else torch.randint(-top, top, shape, generator=g).float()
    return QuantizedWeight(torch.randint(-top, top, (out, inputs), generator=g).to(torch.int8), scale, zero, fmt)


def static(fmt: ActivationFormat | None) -> StaticGrid | None:
    return None if fmt is None or fmt.dynamic else StaticGrid(torch.full((1, 1), 0.02), torch.full((1, 1), 3.0))


@pytest.mark.parametrize("engine", [0, 1, 2, 3])
def test_a_second_copy_for_torch_s_int4_kernel(engine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it may be quicker than planish's decoding, and knows the weight."""
    monkeypatch.setattr(tiles, "engine", lambda: engine)
    kept = PackedLinear(weight(WeightFormat(bits=4, granularity="group", group_size=32)), dtype=torch.bfloat16)
    assert kept.group == (None if engine == 1 and cpu.decodes(64, 2) else 32)
    assert hasattr(kept, "few_weight") == (kept.group is not None)
    assert PackedLinear(weight(WeightFormat(bits=4, symmetric=False)), dtype=torch.bfloat16).group is None


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("processor", ["this", "without AMX", "unsigned inputs"])
def test_is_quantized_linear(name: str, dtype: torch.dtype, tokens: int, extras: bool, processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if processor != "this":
        monkeypatch.setattr(tiles, "engine", lambda: 0)
        monkeypatch.setattr(cpu, "_takes_signed", lambda: processor != "unsigned inputs")
    fmt, activations = FORMS[name]
    if tokens == 0 and activations is not None and activations.granularity == "tensor" and activations.dynamic:
        pytest.skip("a tensor without values has no range")
    chain: Chain = (Scale(draw(64).abs() + 1), Hadamard(32)) if extras else ()
    side = Side(LowRank(draw(3, 64, seed=4), draw(32, 3, seed=5))) if extras else None
    arguments = (weight(fmt), draw(32, seed=2), activations, static(activations), chain)
    x = draw(2, tokens, 64, seed=3).to(dtype)
    y = PackedLinear(*arguments, dtype=dtype, side=side)(x)
    twin, exact = (QuantizedLinear(*arguments, dtype=d, side=side)(x.to(d)) for d in (dtype, torch.float32))
    assert y.shape == twin.shape
    assert y.dtype == dtype
    error, reference = ((z.float() - exact).norm() for z in (y, twin))
    assert float(error) <= 2 * float(reference) + 1e-5 * float(exact.norm())


def test_online_hadamard_alone() -> None:
    fmt, activations = FORMS["w4a8"]
    arguments = (weight(fmt), None, activations, None, (Hadamard(64, draw(64).sign()),))
    x = draw(5, 64, seed=1)
    torch.testing.assert_close(PackedLinear(*arguments)(x), QuantizedLinear(*arguments)(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a16 grouped"])
def test_compiles_as_one_graph(name: str) -> None:
    fmt, activations = FORMS[name]
    layer = PackedLinear(weight(fmt), draw(32), activations, dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    for tokens in (1, 40):
        x = draw(tokens, 64, seed=1).bfloat16()
        torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, activations = FORMS["w8a8"]
    x = draw(20, 64, seed=1)
    y = PackedLinear(weight(fmt), None, activations)(x)
    monkeypatch.setattr(cpu, "prepack", lambda weight_OI: None)
    strided = PackedLinear(weight(fmt), None, activations)
    assert strided.weight.stride() == (1, 32)
    torch.testing.assert_close(strided(x), y)


@pytest.mark.parametrize("tiled", [False, True])
def test_copies_and_moves(tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not tiled:
        monkeypatch.setattr(tiles, "engine", lambda: 0)
    fmt, activations = FORMS["w8a8"]
    layer, x = PackedLinear(weight(fmt), draw(32), activations, dtype=torch.bfloat16), draw(5, 64).bfloat16()
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(layer.float().to("cpu")(x), y)
    with pytest.raises(PlanishError, match="Load the model on meta"):
        layer.to("meta")


def test_what_is_not_supported() -> None:
    eight = ActivationFormat(bits=8)
    assert PackedLinear.supports(weight(WeightFormat(bits=8)), eight)
    assert not PackedLinear.supports(weight(WeightFormat(bits=8)), None)
    assert not PackedLinear.supports(weight(WeightFormat(bits=8, symmetric=False)), eight)
    assert not PackedLinear.supports(weight(WeightFormat(bits=4, granularity="group", group_size=32)), eight)
    assert not PackedLinear.supports(weight(WeightFormat(bits=8)), ActivationFormat(bits=8, granularity="group", group_size=32))
    assert not PackedLinear.supports(weight(WeightFormat(bits=8)), eight, Side(kept=Kept(draw(32, 4))))
    assert not PackedLinear.supports(weight(WeightFormat(bits=4), inputs=33), None)
