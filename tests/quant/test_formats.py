"""Number formats against plain float64 arithmetic, and against compressed-tensors' own quantize and dequantize for given scales."""

import math
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from helpers_solvers import PLAIN, all_codes, format_name, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.quant import errors
from planish.quant.errors import PlanishError
from planish.quant.formats import (
    E4M3,
    NVFP4,
    ActivationFormat,
    Factored,
    Kind,
    QuantizedWeight,
    Scheme,
    WeightFormat,
    activation_grid,
    code_dtype,
    code_range,
    fitted,
    nearest,
    scale_and_zero,
    to_codes,
    weight_range,
)
from planish.quant.linear import StaticGrid, quantize_input

HUGE = 1e37
FOUR = WeightFormat(bits=4, type="float", granularity="group", group_size=16)
FOURS = ActivationFormat(bits=4, type="float", granularity="group", group_size=16)
numbers = st.one_of(st.just(0.0), st.floats(-1e3, 1e3, width=32), st.sampled_from([HUGE, -HUGE, 1e-30, -1e-30, 1e-42]))


def quantized(w_OI: Tensor, fmt: WeightFormat, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    """Rounded to nearest on the plain grid."""
    low, high = weight_range(w_OI, fmt)
    scale, zero = scale_and_zero(low, high, fmt.kind, fmt.symmetric, dtype)
    each = [None if part is None else part.repeat_interleave(w_OI.shape[1] // part.shape[1], 1) for part in (scale, zero)]
    assert each[0] is not None
    return QuantizedWeight(to_codes(w_OI, each[0], each[1], fmt.kind).to(code_dtype(fmt.kind)), scale, zero, fmt)


def plain_range(values: list[float], bits: Kind, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point in Python's own numbers."""
    low, high = min(0.0, *values), max(0.0, *values)
    if bits == E4M3:
        return max(-low, high) / 448, 0
    if symmetric:
        return max(-low, high) / (2 ** (bits - 1) - 1) or 1.0, 0
    scale = (high - low) / (2**bits - 1) or 1.0
    return scale, max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, round(-(2 ** (bits - 1)) - low / scale)))


def library(fmt: WeightFormat) -> QuantizationArgs:
    return QuantizationArgs(num_bits=fmt.bits, type=fmt.type, symmetric=fmt.symmetric, strategy=fmt.granularity, group_size=fmt.group_size)


@pytest.mark.parametrize("fmt", PLAIN, ids=format_name)
def test_weights_equal_the_plain_reference(fmt: WeightFormat) -> None:
    w_OI = weights(5, 24)
    found = quantized(w_OI, fmt)
    per_scale = w_OI.flatten()[None, None] if fmt.granularity == "tensor" else w_OI.unflatten(1, (-1, fmt.group_size or 24))
    for row, groups in enumerate(per_scale):
        for group, values in enumerate(groups):
            scale, zero = plain_range(values.tolist(), fmt.kind, fmt.symmetric)
            assert found.scale[row, group].item() == pytest.approx(scale, rel=1e-6)
            assert fmt.symmetric or (found.zero is not None and found.zero[row, group].item() == zero)
    step = found.scale.repeat_interleave(24 // found.scale.shape[1], 1).double()
    if fmt.type == "float":
        step = torch.maximum(w_OI.abs() / 8, step * 2**-9)
    assert bool(((found.dequantize() - w_OI).abs() <= step * 0.501 * (1 if fmt.symmetric else 2)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", PLAIN, ids=format_name)
def test_codes_and_values_equal_the_librarys(fmt: WeightFormat, dtype: torch.dtype) -> None:
    w_OI = weights(5, 24).float()
    found = quantized(w_OI, fmt, dtype)
    assert torch.equal(found.scale.to(dtype).float(), found.scale)
    args = library(fmt)
    scale = found.scale.reshape(1) if fmt.granularity == "tensor" else found.scale
    zero = torch.zeros_like(scale) if found.zero is None else found.zero.reshape(scale.shape)
    codes = quantize(w_OI, scale, zero, args, dtype=code_dtype(fmt.kind))
    assert torch.equal(found.codes.float(), codes.float())
    assert torch.equal(found.dequantize(), dequantize(codes, scale, None if found.zero is None else zero, args))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_is_used_and_zero_is_exact(bits: int, symmetric: bool) -> None:
    qmin, qmax = code_range(bits)
    assert (qmin, qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    x = torch.linspace(-1, 2, 4001)
    scale, zero = scale_and_zero(x.amin().reshape(1), x.amax().reshape(1), bits, symmetric)
    codes = to_codes(x, scale, zero, bits)
    assert codes.amax() == qmax
    assert codes.amin() in ((-qmax // 2, -qmax // 2 + 1) if symmetric else (qmin,))
    at_zero = to_codes(torch.zeros(1), scale, zero, bits)
    assert at_zero == (0 if zero is None else zero)


@given(st.integers(2, 8), st.booleans(), st.lists(numbers, min_size=1, max_size=9), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_range(bits: int, symmetric: bool, values: list[float], dtype: torch.dtype) -> None:
    """Zeros alone, constants, huge and subnormal values: everything stays finite, and off by a step at most."""
    x = torch.tensor(values, dtype=torch.float32)
    scale, zero = scale_and_zero(x.amin().reshape(1), x.amax().reshape(1), bits, symmetric, dtype)
    codes = to_codes(x, scale, zero, bits)
    qmin, qmax = code_range(bits)
    assert bool(((codes >= qmin) & (codes <= qmax) & (codes == codes.round())).all())
    assert scale.item() > 0
    assert math.isfinite(scale.item())
    back = (codes.double() - (0 if zero is None else zero.double())) * scale.double()
    slack = 1 + 2**bits * max(torch.finfo(dtype).eps, 1e-7)  # a scale rounded down moves the range's ends inwards
    normal = x.abs().amax() >= torch.finfo(torch.float32).tiny * 2**bits
    assert not normal or bool(((back - x.double()).abs() <= scale.double() * slack).all())
    if not x.any():
        assert scale.item() == 1
        assert not back.any()


@given(st.integers(2, 8), st.booleans(), st.floats(1e-3, 1e3), st.booleans())
def test_constants_are_exact_enough(bits: int, symmetric: bool, value: float, negative: bool) -> None:
    x = torch.full((3,), -value if negative else value)
    scale, zero = scale_and_zero(x.amin().reshape(1), x.amax().reshape(1), bits, symmetric)
    codes = to_codes(x, scale, zero, bits)
    assert torch.allclose((codes - (0 if zero is None else zero)) * scale, x, rtol=1e-5)


def test_small_float16_scales_are_kept() -> None:
    """Scales below float16's normal numbers are still there in its subnormal ones: small rows are not wiped out."""
    w_OI = weights(4, 16).float() * 0.02
    found = quantized(w_OI, WeightFormat(bits=8), torch.float16)
    assert bool((found.scale < torch.finfo(torch.float16).tiny).all())
    assert torch.equal(found.scale.half().float(), found.scale)
    assert (found.dequantize() - w_OI).norm() < 0.02 * w_OI.norm()

    least = torch.full((1, 2), 7 * 2.0**-24)  # the smallest number there is, as a scale
    assert torch.equal(quantized(least, WeightFormat(bits=4), torch.float16).dequantize(), least)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_are_codes(bits: int, dtype: torch.dtype) -> None:
    """Where storing rounds a scale down as far as it can, a range on one side of zero has more steps than there are codes."""
    below = 1 + 0.49 * torch.finfo(dtype).eps
    for low, high in ((-below, 0.0), (0.0, below)):
        scale, zero = scale_and_zero(torch.tensor([low * (2**bits - 1)]), torch.tensor([high * (2**bits - 1)]), bits, symmetric=False, dtype=dtype)
        assert scale == 1
        assert zero == code_range(bits)[high == 0]


@pytest.mark.parametrize("fmt", PLAIN, ids=format_name)
def test_some_rows_of_a_weight(fmt: WeightFormat) -> None:
    whole = quantized(weights(6, 24), fmt)
    for some in (slice(2, 4), slice(None, None, 3), slice(5, None)):
        assert torch.equal(whole.rows(some).dequantize(), whole.dequantize()[some])


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_odd_sizes_group_by_group(rows: int, size: int, groups: int, symmetric: bool, seed: int) -> None:
    """A grouped weight is its groups, each quantized as a channel of its own; dead rows are zeros again."""
    size += 1
    w_OI = weights(rows, size * groups, seed).float()
    w_OI[0] = 0
    found = quantized(w_OI, WeightFormat(bits=4, symmetric=symmetric, granularity="group", group_size=size))
    assert found.scale.shape == (rows, groups)
    alone = [quantized(part, WeightFormat(bits=4, symmetric=symmetric)) for part in w_OI.split(size, dim=1)]
    assert torch.equal(found.dequantize(), torch.cat([part.dequantize() for part in alone], 1))
    assert torch.equal(found.integers(), torch.cat([part.integers() for part in alone], 1))
    assert not found.dequantize()[0].any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_grids(symmetric: bool) -> None:
    x_TC = weights(7, 12).float()
    x_TC[3] = 0
    cases = [
        (ActivationFormat(bits=8, symmetric=symmetric), (7, 1), 12),
        (ActivationFormat(bits=8, symmetric=symmetric, granularity="group", group_size=4), (7, 3), 4),
        (ActivationFormat(bits=8, symmetric=symmetric, granularity="tensor"), (1, 1), 84),
    ]
    for fmt, shape, size in cases:
        scale, zero = activation_grid(x_TC, fmt)
        assert scale.shape == shape
        for (row, column), found in zip(((i, j) for i in range(shape[0]) for j in range(shape[1])), scale.flatten().tolist(), strict=True):
            values = x_TC.flatten() if size == 84 else x_TC[row, column * size :][:size]
            expected, offset = plain_range(values.tolist(), 8, symmetric)
            assert found == pytest.approx(expected, rel=1e-6)
            assert symmetric or (zero is not None and zero[row, column] == offset)
    assert activation_grid(x_TC[:0], ActivationFormat(bits=8))[0].shape == (0, 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("fmt", [{}, {"granularity": "group", "group_size": 4}, {"granularity": "tensor"}], ids=str)
def test_activation_clip_scales_the_range(symmetric: bool, fmt: dict[str, Any]) -> None:
    """By a power of 2 the scale of the clipped grid is exactly that of an input so much smaller; 1 is no clip, to the bit."""
    x_TC = weights(7, 12).float()
    x_TC[3] = 0
    x_TC[0, 0] = 1e30
    plain = activation_grid(x_TC, ActivationFormat(bits=4, symmetric=symmetric, **fmt))
    for clip, factor in ((1.0, 1.0), (0.5, 0.5)):
        scale, zero = activation_grid(x_TC, ActivationFormat(bits=4, symmetric=symmetric, clip=clip, **fmt))
        assert torch.equal(scale, torch.where(plain[0] == 1, plain[0], plain[0] * factor))
        assert zero is None if plain[1] is None else zero is not None and torch.equal(zero, plain[1])


def by_hand(values: list[float], factor: float) -> list[float]:
    """What NVFP4 makes of one group, in Python's own numbers: the nearest of all e4m3 numbers as the scale, the nearest of all codes, of two equally
    near ones the even, of which each list has every second."""
    scales = sorted(number for number in all_codes(E4M3).tolist() if number >= 0)
    size = max(map(abs, values)) / 6 * factor
    scale = min(enumerate(dict.fromkeys(scales)), key=lambda item: (abs(item[1] - size), item[0] % 2))[1]
    if scale == 0:
        return [0.0] * len(values)
    codes = list(enumerate([0, 0.5, 1, 1.5, 2, 3, 4, 6]))

    def code(x: float) -> float:
        return min(codes, key=lambda item: (abs(item[1] - abs(x) / (scale / factor)), item[0] % 2))[1]

    return [math.copysign(code(x) * scale / factor, x) for x in values]


@pytest.mark.parametrize("factor", [1.0, 2.0**9, 2.0**-9])
def test_nvfp4_by_hand(factor: float) -> None:
    """Groups of every size from what is beyond the last scale to what is flushed to 0."""
    x_TC = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-16, 12, 40, base=2)[:, None] / factor
    found = quantize_input(x_TC, FOURS, StaticGrid(torch.tensor([[1 / factor]]), None)).dequantize()
    expected = [by_hand(row[start : start + 16], factor) for row in x_TC.tolist() for start in (0, 16)]
    assert torch.equal(found, torch.tensor(expected).reshape(40, 32))
    assert not found[0].any()
    assert found[-1].abs().max() == 6 * 448 / factor


def test_nvfp4_codes() -> None:
    codes = all_codes(NVFP4)
    assert torch.equal(nearest(codes.clone(), NVFP4), codes)
    assert torch.equal(codes.to(code_dtype(NVFP4)).float(), codes)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, math.inf, math.nan])
    expected = [0, 1, 1, 2, 2, 4, 4, 6, 6, 9]
    assert nearest(ties.clone(), NVFP4).nan_to_num(9).tolist() == expected
    assert nearest(-ties[:-1], NVFP4).tolist() == [-value for value in expected[:-1]]


@given(st.lists(st.floats(-8, 8, width=32), min_size=1))
def test_nvfp4_goes_to_the_nearest_of_all_codes(values: list[float]) -> None:
    codes, x = all_codes(NVFP4).double(), torch.tensor(values)
    found = nearest(x.clone(), NVFP4)
    assert bool(torch.isin(found, codes.float()).all())
    assert torch.equal((found - x).abs().double(), (codes - x.double()[:, None]).abs().amin(1).float().double())


@given(st.floats(2.0**-90, 2.0**90))
def test_factors_reach_twice_as_far(absmax: float) -> None:
    factored = fitted(torch.tensor([[absmax, -absmax / 3]]), FOUR, torch.bfloat16)
    assert isinstance(factored, Factored)
    assert isinstance(factored.factor, float)
    assert math.frexp(factored.factor)[0] == 0.5
    assert 2 * absmax * (1 - 1e-6) <= 6 * 448 / factored.factor < 4 * absmax * (1 + 1e-6)
    assert fitted(torch.zeros(1, 16), FOUR, factored) is factored


def test_nvfp4_weights_are_stored_as_they_were_measured() -> None:
    """Dead groups are zeros."""
    w_OI = weights(9, 64).float() * torch.logspace(-6, 3, 9, base=10)[:, None]
    w_OI[2] = 0
    factored = fitted(w_OI, FOUR, torch.bfloat16)
    assert isinstance(factored, Factored)
    scale, zero = scale_and_zero(*weight_range(w_OI, FOUR), FOUR.kind, True, factored)
    codes = to_codes(w_OI.unflatten(1, (4, 16)), scale[:, :, None], zero, FOUR.kind).flatten(1).to(code_dtype(FOUR.kind))
    back = QuantizedWeight(codes, scale, None, FOUR).dequantize()
    assert torch.equal(back.bfloat16().float(), back)  # so all consumers multiply the same numbers
    assert not back[2].any()
    assert ((back - w_OI).norm(dim=1) / w_OI.norm(dim=1))[5:].max() < 0.12
    assert torch.equal(factored.numbers(scale).float() / factored.factor, scale)
    assert fitted(w_OI, WeightFormat(bits=4), torch.bfloat16) is torch.bfloat16
    assert Factored.reaching(0.0).factor == 1
    with pytest.raises(PlanishError, match="scales of NVFP4 are to be e4m3 numbers"):
        factored.numbers(scale * 1.03)


floats = st.one_of(st.floats(-500, 500, width=32), st.floats(-(2**-5), 2**-5, width=32), st.sampled_from([0.0, 448.0, HUGE, -HUGE]))


@given(st.lists(floats, min_size=1))
def test_floats_go_to_the_nearest_of_all_codes(values: list[float]) -> None:
    codes, x = all_codes(E4M3).double(), torch.tensor(values)
    found = nearest(x.clone(), E4M3)
    assert found.dtype == torch.float32
    assert bool(torch.isin(found, codes.float()).all())
    assert torch.equal((found - x).abs().double(), (codes - x.double()[:, None]).abs().amin(1).float().double())


def test_every_float_is_a_code_and_ties_go_to_the_even_one() -> None:
    codes = all_codes(E4M3)
    assert (len(codes), codes.min(), codes.max(), codes[codes > 0].min()) == (254, -448, 448, 2**-9)
    assert torch.equal(nearest(codes.clone(), E4M3), codes)
    assert nearest(torch.tensor([17.0, 19.0, 21.0, -17.0, 2**-10, 3 * 2**-10, math.nan, math.inf]), E4M3).nan_to_num(7).tolist() == [
        *(16, 20, 20, -16, 0, 2**-8, 7, 448)
    ]


REFUSED = {
    "weights: a float of 6 bits": lambda: WeightFormat(bits=6, type="float"),
    "activations: a float of 4 bits, symmetric False": lambda: ActivationFormat(bits=4, type="float", symmetric=False),
    "weights: floats of 4 bits with granularity channel": lambda: WeightFormat(bits=4, type="float"),
    "activations: floats of 4 bits with granularity group, group_size 32": lambda: ActivationFormat(
        bits=4, type="float", granularity="group", group_size=32
    ),
    "nvfp4 weights, fp8 activations": lambda: Scheme(weights=FOUR, activations=ActivationFormat(bits=8, type="float")),
    "fp8 weights, nvfp4 activations": lambda: Scheme(weights=WeightFormat(bits=8, type="float"), activations=FOURS),
    "activations: a float of 8 bits, symmetric False": lambda: ActivationFormat(bits=8, type="float", symmetric=False),
    "Use channel": lambda: WeightFormat(bits=8, type="float", granularity="group", group_size=32),
    "Use token": lambda: ActivationFormat(bits=8, type="float", granularity="group", group_size=32),
    "weights are of type int, activations of type float": lambda: Scheme(
        weights=WeightFormat(bits=8), activations=ActivationFormat(bits=8, type="float")
    ),
    "activations.clip is 0.0": lambda: ActivationFormat(bits=4, clip=0.0),
    "activations.clip is 1.5": lambda: ActivationFormat(bits=4, clip=1.5),
    "activations.clip is nan": lambda: ActivationFormat(bits=4, clip=math.nan),
    "static with clip 0.9": lambda: ActivationFormat(bits=8, granularity="tensor", dynamic=False, clip=0.9),
    "weights.bits is 9": lambda: WeightFormat(bits=9),
    "weights.bits is 1": lambda: WeightFormat(bits=1),
    "activations.bits is 16": lambda: ActivationFormat(bits=16),
    "group_size goes with granularity group": lambda: WeightFormat(bits=4, group_size=32),
    "granularity group with group_size None": lambda: WeightFormat(bits=4, granularity="group"),
    "at least 2 channels": lambda: WeightFormat(bits=4, granularity="group", group_size=1),
    "static with granularity token": lambda: ActivationFormat(bits=8, dynamic=False),
    "activations are quantized but weights are not": lambda: Scheme(activations=ActivationFormat(bits=8)),
    "does not divide 10 input channels": lambda: WeightFormat(bits=4, granularity="group", group_size=4).groups(10),
    "does not divide 10 channels": lambda: activation_grid(torch.zeros(2, 10), ActivationFormat(bits=8, granularity="group", group_size=4)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused(words: str) -> None:
    with pytest.raises(PlanishError, match=words):
        REFUSED[words]()


def test_nearest_names() -> None:
    assert errors.nearest("gptk", ["gptq", "rtn"]) == "Did you mean gptq?"
    assert errors.nearest("zzz", ["gptq", "rtn"]) == "Known: gptq, rtn."
