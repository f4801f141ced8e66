"""The quantized linear against fake quantization in float64: every granularity, symmetric or not, static or dynamic, grouped."""

import itertools

import pytest
import torch
from helpers_solvers import FORMATS, all_codes, format_name, inputs, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.calib.machine.precision import bfloat16_products
from planish.quant.formats import NVFP4, ActivationFormat, Factored, QuantizedWeight, WeightFormat, scale_and_zero
from planish.quant.linear import Kept, Parts, QuantizedLinear, Side, StaticGrid, quantize_input, share_input, without_first
from planish.quant.low_rank import LowRank
from planish.quant.solvers import Rtn
from planish.quant.transforms.factors import Scale

ACTIVATIONS: list[ActivationFormat | None] = [
    None,
    *(ActivationFormat(bits=8, symmetric=symmetric) for symmetric in (True, False)),
    *(ActivationFormat(bits=4, symmetric=symmetric, granularity="group", group_size=8) for symmetric in (True, False)),
    *(ActivationFormat(bits=8, symmetric=s, granularity="tensor", dynamic=dynamic) for s in (True, False) for dynamic in (True, False)),
    ActivationFormat(bits=8, type="float"),
    ActivationFormat(bits=8, type="float", granularity="tensor", dynamic=False),
    ActivationFormat(bits=4, type="float", granularity="group", group_size=16),
]


def activation_name(fmt: ActivationFormat | None) -> str:
    return "none" if fmt is None else f"{fmt.name}{'s' if fmt.symmetric else 'a'}-{fmt.granularity}{'' if fmt.dynamic else '-static'}"


def static_of(x_TC: Tensor, fmt: ActivationFormat | None) -> StaticGrid | None:
    """A static grid that clips a little; of NVFP4 a factor."""
    if fmt is not None and fmt.kind == NVFP4:
        return StaticGrid(torch.tensor([[2.0**-5]]), None)
    if fmt is None or fmt.dynamic:
        return None
    return StaticGrid(*scale_and_zero(0.8 * x_TC.amin().reshape(1, 1), 0.9 * x_TC.amax().reshape(1, 1), fmt.kind, fmt.symmetric, torch.bfloat16))


def rounded(out_channels: int, in_channels: int, fmt: WeightFormat, seed: int = 1) -> QuantizedWeight:
    return Rtn().solve(weights(out_channels, in_channels, seed).float(), fmt, None, torch.bfloat16).weight


def fake(x_TC: Tensor, fmt: ActivationFormat | None, static: StaticGrid | None) -> Tensor:
    """x quantized and dequantized in float64, by nothing but the definition; grids in float32 as they are stored or computed at run time."""
    if fmt is None:
        return x_TC.double()
    size = {"tensor": x_TC.numel(), "token": x_TC.shape[1], "group": fmt.group_size or 0}[fmt.granularity]
    x = x_TC.reshape(-1, size).double()
    if static is None or fmt.dynamic:
        stored = None if static is None else Factored(1 / static.scale.item())
        scale, zero = scale_and_zero(x.amin(1, True).float(), x.amax(1, True).float(), fmt.kind, fmt.symmetric, stored)
    else:
        scale, zero = static.scale, static.zero
    offset = 0.0 if zero is None else zero.double()
    steps, half = x / scale.double() + offset, 2 ** (fmt.bits - 1)
    if fmt.type == "float":
        every = all_codes(fmt.kind).double()
        odd = torch.searchsorted(every.abs().unique(), every.abs()) % 2  # of two equally near ones the even
        codes = every[((steps[..., None] - every).abs() + 1e-9 * odd).argmin(-1)]
    else:
        codes = steps.round().clamp(-half, half - 1)
    return ((codes - offset) * scale.double()).reshape(x_TC.shape)


def float64_output(x_TC: Tensor, weight: QuantizedWeight, bias: Tensor | None, fmt: ActivationFormat | None, static: StaticGrid | None) -> Tensor:
    scale = weight.scale.double().repeat_interleave(weight.codes.shape[1] // weight.scale.shape[1], 1)
    zero = 0.0 if weight.zero is None else weight.zero.double().repeat_interleave(weight.codes.shape[1] // weight.zero.shape[1], 1)
    y = fake(x_TC, fmt, static) @ ((weight.codes.double() - zero) * scale).T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("act", ACTIVATIONS, ids=activation_name)
@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_equals_fake_quantization(fmt: WeightFormat, act: ActivationFormat | None) -> None:
    x = inputs(15, 48).float()
    weight, bias, static = rounded(10, 48, fmt), weights(1, 10)[0].float(), static_of(x, act)
    for b in (None, bias):
        expected = float64_output(x, weight, b, act, static)
        layer = QuantizedLinear(weight, b, act, static)
        found = layer(x.reshape(3, 5, 48))
        assert found.shape == (3, 5, 10)
        assert float((found.reshape(15, 10) - expected).norm() / expected.norm()) < 1e-6
        half = QuantizedLinear(weight, b, act, static, dtype=torch.bfloat16)(x.bfloat16())
        assert half.dtype is torch.bfloat16
        same_input = float64_output(x.bfloat16().float(), weight, b, act, static)
        assert float((half.double() - same_input).norm() / same_input.norm()) < 0.012


@pytest.mark.parametrize("act", ACTIVATIONS, ids=activation_name)
def test_tokens_in_pieces_are_tokens_together(act: ActivationFormat | None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(15, 48).float()
    layer = QuantizedLinear(rounded(10, 48, WeightFormat(bits=8)), None, act, static_of(x, act))
    together = layer(x)
    monkeypatch.setattr("planish.quant.pieces.CACHED", 4 * 48)
    assert torch.equal(layer(x), together)


@pytest.mark.parametrize("act", [None, ActivationFormat(bits=8), ActivationFormat(bits=8, symmetric=False)], ids=activation_name)
def test_sums_of_codes_are_beyond_float16(act: ActivationFormat | None) -> None:
    weight, x = rounded(64, 4096, WeightFormat(bits=8)), inputs(9, 4096).half()
    found, expected = QuantizedLinear(weight, None, act, dtype=torch.float16)(x), float64_output(x.float(), weight, None, act, None)
    assert found.dtype is torch.float16
    assert float((found.double() - expected).norm() / expected.norm()) < 0.005


@pytest.mark.parametrize("act", [a for a in ACTIVATIONS if a is not None], ids=activation_name)
def test_readers_share_the_quantized_input(act: ActivationFormat) -> None:
    x = inputs(15, 48).float()
    static = static_of(x, act)
    quantized = quantize_input(x, act, static)
    assert quantized.codes.dtype is (torch.int8 if act.type == "int" else torch.bfloat16)
    assert torch.allclose(quantized.dequantize().double(), fake(x, act, static), rtol=1e-6)
    layers = [QuantizedLinear(rounded(10, 48, fmt, seed), None, act, static) for seed, fmt in enumerate(FORMATS[:2])]
    left = layers[0].left(quantized)
    for layer in layers:
        assert torch.equal(layer.multiply(quantized, left), layer(x))


def test_readers_that_prepare_an_input_alike_share_it_as_long_as_it_is_the_same() -> None:
    x, act = inputs(15, 48).float(), ActivationFormat(bits=4, symmetric=False)
    shared, alone = ([QuantizedLinear(rounded(10, 48, WeightFormat(bits=4), seed), None, act) for seed in range(3)] for _ in range(2))
    share_input(shared)
    for mine, twin in zip(shared, alone, strict=True):
        assert torch.equal(mine(x), twin(x))
        x *= torch.linspace(0.5, 2, 48)  # changed in place: another input
    assert shared[0].shared is shared[2].shared is not None


def test_readers_that_prepare_an_input_otherwise_do_not_share_it() -> None:
    weight, act, static = (
        rounded(10, 48, WeightFormat(bits=4)),
        ActivationFormat(bits=8),
        ActivationFormat(bits=8, granularity="tensor", dynamic=False),
    )
    grids = [StaticGrid(torch.full((1, 1), scale), None) for scale in (0.1, 0.2)]
    pairs = (
        (QuantizedLinear(weight, None, act), QuantizedLinear(weight, None, ActivationFormat(bits=4))),
        (QuantizedLinear(weight, None, act), QuantizedLinear(weight, None, act, side=Side(None, Kept(weights(10, 4).float())))),
        (QuantizedLinear(weight, None, static, grids[0]), QuantizedLinear(weight, None, static, grids[1])),
    )
    for one, other in pairs:
        share_input((one, other))
        assert one.shared is None
        assert other.shared is None


@pytest.mark.parametrize(("weight_symmetric", "act_symmetric"), list(itertools.product([True, False], repeat=2)))
def test_integer_products_are_exact(weight_symmetric: bool, act_symmetric: bool) -> None:
    """Codes minus zero points need 8 bits and a sign: bfloat16 holds them, and float32 their sums; whichever product is used, the same bits."""
    x = inputs(9, 96).float()
    act = ActivationFormat(bits=8, symmetric=act_symmetric)
    weight = rounded(11, 96, WeightFormat(bits=8, symmetric=weight_symmetric))
    quantized = quantize_input(x, act)
    whole = quantized.integers(torch.float32).long() @ weight.integers().long().T
    assert torch.equal(quantized.integers(torch.bfloat16).float(), quantized.integers(torch.float32))
    assert torch.equal(weight.integers().bfloat16().float(), weight.integers())
    layer = QuantizedLinear(weight, None, act)
    found = []
    for on in (False, True):
        with bfloat16_products(on):
            assert torch.equal((layer.left(quantized) @ layer.matrix.T).long(), whole)
            found.append(layer(x))
    assert torch.equal(*found)


def test_extreme_codes_of_asymmetric_formats() -> None:
    """Zero points at both ends: code minus zero point reaches -255 and 255."""
    x = torch.stack([torch.linspace(0, 1, 8), torch.linspace(-1, 0, 8)])
    quantized = quantize_input(x, ActivationFormat(bits=8, symmetric=False))
    assert quantized.integers(torch.bfloat16).amax() == 255
    assert quantized.integers(torch.bfloat16).amin() == -255


@pytest.mark.parametrize("act", ACTIVATIONS, ids=activation_name)
@pytest.mark.parametrize("bits", [None, 8])
def test_side_path(act: ActivationFormat | None, bits: int | None) -> None:
    """Low rank on the input as it is; the first channels in a product of their own, of whose range the codes know nothing."""
    x, fmt = inputs(15, 48).float(), WeightFormat(bits=4)
    x[:, :8] *= 100
    w_OI, low = weights(10, 48).float(), LowRank(weights(2, 48, 2).float(), weights(10, 2, 3).float())
    rest_OI, rest = without_first(w_OI, 8), without_first(x, 8)
    weight, static = Rtn().solve(rest_OI, fmt, None, torch.float32).weight, static_of(rest, act)
    high = None if act is None or bits is None else ActivationFormat(bits=8)
    kept = Kept(w_OI[:, :8] if bits is None else Rtn().solve(w_OI[:, :8], WeightFormat(bits=8), None, torch.float32).weight, high)
    expected = float64_output(rest, weight, None, act, static) + x.double() @ low.product().T
    first_OR = kept.weight.dequantize() if isinstance(kept.weight, QuantizedWeight) else kept.weight
    expected += fake(x[:, :8], high, None) @ first_OR.double().T
    found = QuantizedLinear(weight, None, act, static, side=Side(low, kept))(x.reshape(3, 5, 48))
    assert float((found.reshape(15, 10) - expected).norm() / expected.norm()) < 1e-6
    parts, some = Parts(weight, weights(1, 10, 4)[0].float(), act, static, (), torch.float32, Side(low, kept)), torch.tensor([7, 2, 3])
    torch.testing.assert_close(QuantizedLinear(*parts.rows(some))(x), QuantizedLinear(*parts)(x)[:, some])
    half = QuantizedLinear(weight, None, act, static, dtype=torch.bfloat16, side=Side(low, kept))(x.bfloat16())
    assert half.dtype is torch.bfloat16
    assert float((half - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_some_rows_compute_what_the_whole_does(fmt: WeightFormat) -> None:
    x, some = inputs(9, 48).float(), torch.tensor([4, 5, 0])
    parts = Parts(rounded(8, 48, fmt), None, ActivationFormat(bits=8), None, (Scale(torch.linspace(0.5, 2, 48)),), torch.float32, None)
    torch.testing.assert_close(QuantizedLinear(*parts.rows(some))(x), QuantizedLinear(*parts)(x)[:, some])


def test_the_input_goes_through_the_chain_before_it_is_quantized() -> None:
    x = inputs(9, 48).float()
    divisor = torch.linspace(0.5, 3, 48)
    weight = rounded(10, 48, FORMATS[0])
    for act in (None, ActivationFormat(bits=8)):
        assert torch.equal(QuantizedLinear(weight, None, act, None, (Scale(divisor),))(x), QuantizedLinear(weight, None, act)(x / divisor))


values = st.one_of(st.just(0.0), st.floats(-100, 100, width=32), st.sampled_from([1e30, -1e30, 1e-30]))


@given(st.data(), st.integers(0, 4), st.integers(1, 7), st.integers(1, 4), st.sampled_from([*ACTIVATIONS[1:3], None]))
def test_odd_sizes_and_odd_values(data: st.DataObject, tokens: int, channels: int, out: int, act: ActivationFormat | None) -> None:
    """No tokens, one channel, rows of zeros, constant rows, huge values."""
    rows = data.draw(st.lists(st.lists(values, min_size=channels, max_size=channels), min_size=tokens, max_size=tokens))
    x = torch.tensor(rows, dtype=torch.float32).reshape(tokens, channels)
    if tokens > 1:
        x[0], x[1] = 0, 7.0
    weight = rounded(out, channels, WeightFormat(bits=8))
    found = QuantizedLinear(weight, None, act)(x)
    expected = float64_output(x, weight, None, act, None)
    assert found.shape == (tokens, out)
    size = x.double().abs().amax(1, keepdim=True) * weight.dequantize().double().abs().sum(1)
    step = 0.0 if act is None else 1 / 127  # in float64 a value that lies between two codes may go to the other one
    assert bool(((found.double() - expected).abs() <= (1e-5 + step) * size + 1e-30).all())
