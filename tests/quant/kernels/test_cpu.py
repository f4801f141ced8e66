"""The operators on a CPU: against float64 twins, against QuantizedLinear, odd shapes, input that is not finite, torch.compile."""

import pytest
import torch
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, QuantizedWeight, WeightFormat
from planish.quant.kernels import NAMES, cpu, pack_nibbles, unpack_nibbles
from planish.quant.linear import QuantizedLinear, Side, quantize_input
from planish.quant.low_rank import LowRank
from planish.quant.transforms.factors import Blocks, Hadamard

OPS = torch.ops.planish
GRIDS = [(8, True, False), (8, False, False), (4, True, True), (4, False, True), (4, False, False), (6, True, False)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def integers(*shape: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def unpacked(codes: Tensor, packed: bool) -> Tensor:
    return unpack_nibbles(codes) if packed else codes


def test_nibbles_all_bytes() -> None:
    codes = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = pack_nibbles(codes)
    assert sorted(packed.flatten().tolist()) == list(range(-128, 128))
    assert torch.equal(unpack_nibbles(packed), codes)
    with pytest.raises(PlanishError, match="3 codes"):
        pack_nibbles(codes.new_zeros(2, 3))


@pytest.mark.parametrize(("bits", "symmetric", "packed"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 46), (1, 64), (0, 32)])
def test_quantize_is_that_of_quantized_linear(bits: int, symmetric: bool, packed: bool, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = draw(*shape, dtype=dtype)
    x[1:2] = 0
    for clip in (1.0, 0.8):
        codes, scale, zero = OPS.quantize_per_token(x, bits, symmetric, clip, packed)
        twin = quantize_input(x, ActivationFormat(bits=bits, symmetric=symmetric, clip=clip))
        assert torch.equal(unpacked(codes, packed), twin.codes)
        assert torch.equal(scale, twin.scale)
        assert zero.shape == (0, 1) if twin.zero is None else torch.equal(zero, twin.zero.int())


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 4096, 513), (20, 2500, 70), (3, 1025, 1), (5, 1, 7), (0, 64, 7)])
def test_sums_of_codes_are_exact(instructions: bool, tokens: int, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the processor's instructions for bytes, if it has them, and without; the largest codes, too."""
    if not instructions:
        monkeypatch.setattr(cpu, "exact", lambda: False)
        monkeypatch.setattr(cpu, "_WIDENED", 1 << 12)
    least = torch.full((tokens, inputs), -128, dtype=torch.int8), torch.full((outputs, inputs), -128, dtype=torch.int8)
    for x, weight in ((integers(tokens, inputs, bits=8), integers(outputs, inputs, bits=8, seed=1)), least):
        assert torch.equal(cpu._products(x, weight).long(), x.long() @ weight.long().T)


def test_onednn_is_right_where_it_is_taken() -> None:
    """On the largest codes of all signs, whose pairs overflow 16 bits."""
    for sign in (1, -1):
        codes, weight = torch.full((40, 192), 127, dtype=torch.int8), torch.full((48, 192), sign * 127, dtype=torch.int8)
        packed = cpu.prepack(weight)
        assert (packed is None) != cpu.exact()
        found = OPS.linear_w8a8(codes, None, None, weight if packed is None else packed, torch.ones(48), None, None, None, None, torch.float32)
        assert bool((found == sign * 192 * 127**2).all())


def test_quantize_input_that_is_not_contiguous_or_aligned() -> None:
    wide = draw(6, 66)
    for x in (wide[:, 1:65], wide[::2, ::2], draw(64, 6).T):
        for got, twin in zip(
            OPS.quantize_per_token(x, 8, False, 1.0, False), OPS.quantize_per_token(x.contiguous(), 8, False, 1.0, False), strict=True
        ):
            assert torch.equal(got, twin)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_token_that_is_not_finite_spoils_its_own_outputs_only(bad: float, symmetric: bool) -> None:
    x = draw(3, 32)
    x[1, 7] = bad
    codes, scale, zero = OPS.quantize_per_token(x, 8, symmetric, 1.0, False)
    weight, good = integers(16, 32, bits=8), [0, 2]
    y = OPS.linear_w8a8(
        codes, scale, None if symmetric else zero, weight, torch.ones(16), weight.sum(1, dtype=torch.int32), None, None, None, torch.float32
    )
    assert y[1].isnan().all()
    assert torch.equal(codes[good], OPS.quantize_per_token(x[good], 8, symmetric, 1.0, False)[0])
    assert y[good].isfinite().all()
    assert OPS.quantize_fp8(x)[1].isnan().flatten().tolist() == [False, True, False]


def test_fused_quantizers() -> None:
    x, gate, weight = draw(4, 24, dtype=torch.bfloat16), draw(4, 24, seed=1, dtype=torch.bfloat16), draw(24, seed=2, dtype=torch.bfloat16)
    signs, matrix = draw(24, seed=3).sign(), draw(2, 12, 12, seed=4)
    norm = torch.nn.functional.rms_norm(x.float(), (24,), eps=1e-5).bfloat16() * weight
    pairs = [
        (OPS.hadamard_quantize(x, signs, 12, 8, False, 1.0, False), Hadamard(12, signs).on_input(x)),
        (OPS.hadamard_quantize(x, None, 24, 8, False, 1.0, False), Hadamard(24).on_input(x)),
        (OPS.blocks_quantize(x, matrix, 8, False, 1.0, False), Blocks(matrix).on_input(x)),
    ]
    for fused, alone in pairs:
        for got, twin in zip(fused, OPS.quantize_per_token(alone, 8, False, 1.0, False), strict=True):
            assert torch.equal(got, twin)
    pairs = [
        (OPS.rms_norm_quantize(x, weight, 1e-5, 8, False, 1.0, False), norm),
        (OPS.silu_mul_quantize(gate, x, 8, False, 1.0, False), torch.nn.functional.silu(gate) * x),
    ]
    for fused, alone in pairs:  # but for the order of sums and the last bit of exp
        for got, twin in zip(fused, OPS.quantize_per_token(alone, 8, False, 1.0, False), strict=True):
            off = (got.double() - twin).abs()
            assert off.max() <= (2**-8 * twin.abs().max() if got.dtype == torch.float32 else 1)
            assert (off > 0).float().mean() < 0.1 or got.dtype == torch.float32


def integer_case(name: str, tokens: int, asymmetric: bool, side: bool) -> tuple[tuple[object, ...], Tensor]:
    """Operands of an integer linear of 34 inputs and 9 outputs, and its result in float64."""
    x_bits, w_bits = (4 if name == "linear_w4a4" else 8), (8 if name == "linear_w8a8" else 4)
    x, weight = integers(tokens, 34, bits=x_bits), integers(9, 34, bits=w_bits, seed=1)
    x_scale, w_scale, bias = draw(tokens, 1).abs(), draw(9, seed=2).abs(), draw(9, seed=3)
    x_zero = integers(tokens, 1, bits=x_bits, seed=4).int() if asymmetric else None
    low, up = (draw(tokens, 3, seed=5), draw(9, 3, seed=6)) if side else (None, None)
    twin = (x.double() - (0 if x_zero is None else x_zero)) * x_scale.double() @ (weight.double() * w_scale[:, None]).T + bias.double()
    twin += low.double() @ up.double().T if low is not None and up is not None else 0
    operands = (pack_nibbles(x) if x_bits == 4 else x, x_scale, x_zero, pack_nibbles(weight) if w_bits == 4 else weight, w_scale)
    return (*operands, weight.sum(1, dtype=torch.int32), bias, low, up, torch.float32), twin


@pytest.mark.parametrize("name", ["linear_w8a8", "linear_w4a8", "linear_w4a4"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("side", [False, True])
def test_integer_linear_against_float64(name: str, tokens: int, asymmetric: bool, side: bool) -> None:
    operands, twin = integer_case(name, tokens, asymmetric, side)
    y = getattr(OPS, name)(*operands)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), twin, rtol=1e-5, atol=1e-2)  # sums of up to 34 * 127 * 127 * 9 * 9, some of which nearly cancel


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_linear_is_quantized_linear(bits: int, symmetric: bool) -> None:
    codes, scale, x = integers(24, 48, bits=bits), draw(24, 1).abs(), draw(7, 48)
    bias, low = draw(24, seed=1), LowRank(draw(2, 48, seed=2), draw(24, 2, seed=3))
    activations = ActivationFormat(bits=8, symmetric=symmetric)
    twin = QuantizedLinear(QuantizedWeight(codes, scale, None, WeightFormat(bits=bits)), bias, activations, side=Side(low))(x)
    q, s, z = OPS.quantize_per_token(x, 8, symmetric, 1.0, False)
    weight = codes if bits == 8 else pack_nibbles(codes)
    op = OPS.linear_w8a8 if bits == 8 else OPS.linear_w4a8
    side_T = x @ low.down_RC.T
    y = op(q, s, None if symmetric else z, weight, scale.flatten(), codes.sum(1, dtype=torch.int32), bias, side_T, low.up_OR, torch.float32)
    torch.testing.assert_close(y, twin, rtol=1e-5, atol=1e-3)


W4A16 = [
    (0, 64, 9, 2),
    (1, 576, 33, 9),
    (2, 48, 9, 3),
    (3, 48, 10, 3),
    (3, 90, 7, 1),
    (4, 1536, 20, 12),
    (17, 1024, 40, 8),
    (40, 576, 16, 9),
    (33, 96, 5, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", W4A16)
@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_w4a16(dtype: torch.dtype, case: tuple[int, int, int, int], asymmetric: bool, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens and many, groups that a pass decodes and others, against float64."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: fast)
    tokens, inputs, outputs, groups = case
    codes, scale, zero = integers(outputs, inputs, bits=4), draw(outputs, groups).abs(), integers(outputs, groups, bits=4, seed=1).float()
    x, bias, zeros = draw(tokens, inputs, dtype=dtype), draw(outputs, dtype=dtype), zero if asymmetric else torch.zeros_like(zero)
    w_OI = ((codes.view(outputs, groups, -1) - zeros.double()[:, :, None]) * scale.double()[:, :, None]).flatten(1)
    y = OPS.linear_w4a16(x, pack_nibbles(codes), scale, zero if asymmetric else None, bias)
    assert y.dtype == dtype
    twin, allowed = x.double() @ w_OI.T + bias.double(), 2**-22 if dtype == torch.float32 else 2**-9
    bound = allowed * (x.double().abs() @ w_OI.abs().T + twin.abs()) + 1e-30
    assert ((y.double() - twin).abs() <= 2 * bound).all()
    decoded = cpu.decodes(inputs, groups) and 0 < tokens <= cpu.FEW
    if not decoded and (fast or dtype == torch.float32):
        fmt = WeightFormat(bits=4, symmetric=not asymmetric, granularity="group", group_size=inputs // groups)
        reference = QuantizedLinear(QuantizedWeight(codes, scale, zero if asymmetric else None, fmt), bias, dtype=dtype)
        assert torch.equal(y, reference(x))
    if decoded:
        apart = OPS.linear_w4a16(torch.stack([x, x + 1], 1)[:, 0], pack_nibbles(codes), scale, zero if asymmetric else None, bias)
        assert torch.equal(apart, y)
        x[0, -1] = torch.nan
        assert OPS.linear_w4a16(x, pack_nibbles(codes), scale, None, None).isnan().all(1).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "shape", [(0, 8, 3), (0, 16, 3), (3, 8, 5), (1, 32, 1), (1, 576, 300), (2, 48, 63), (3, 64, 64), (4, 2048, 129), (40, 33, 7), (9, 2048, 1500)]
)
@pytest.mark.parametrize("biased", [True, False])
def test_bfloat16_in_float32(fast: bool, shape: tuple[int, int, int], biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once, so as near to float64 as bfloat16 can be; a weight in several pieces."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: fast)
    tokens, inputs, outputs = shape
    x, w, b = (draw(*size, seed=seed, dtype=torch.bfloat16) for seed, size in enumerate([(tokens, inputs), (outputs, inputs), (outputs,)]))
    y = cpu.linear(x, w, b if biased else None)
    twin = x.double() @ w.double().T + (b.double() if biased else 0)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), twin, rtol=2**-8, atol=1e-4 * inputs)
    apart = torch.stack([x, x + 1], 1)[:, 0]
    assert torch.equal(cpu.linear(apart, w, b if biased else None), y)


def test_fp8() -> None:
    x, weight = draw(5, 32), draw(12, 32, seed=1)
    (q, s), (w, t) = OPS.quantize_fp8(x), OPS.quantize_fp8(weight)
    twin = (q.double() * s) @ (w.double() * t).T + 1
    y = OPS.linear_fp8(q, s, w, t.flatten(), torch.ones(12), torch.float32)
    torch.testing.assert_close(y.double(), twin, rtol=1e-5, atol=1e-5)
    assert float((twin - 1 - x.double() @ weight.double().T).norm() / (x @ weight.T).norm()) < 0.05
    assert s.flatten().tolist() == pytest.approx((x.abs().amax(1) / 448).tolist())


def samples() -> dict[str, tuple[object, ...]]:
    x, grid = draw(3, 34), (8, False, 1.0, False)
    fp8, scale = OPS.quantize_fp8(draw(16, 34))
    integer = {name: integer_case(name, 3, True, True)[0] for name in ("linear_w8a8", "linear_w4a8", "linear_w4a4")}
    return integer | {
        "quantize_per_token": (x, 4, True, 0.9, True),
        "rms_norm_quantize": (x, draw(34), 1e-5, *grid),
        "silu_mul_quantize": (x, x, *grid),
        "hadamard_quantize": (x, None, 2, *grid),
        "blocks_quantize": (x, draw(1, 2, 2), *grid),
        "quantize_fp8": (x,),
        "linear_w4a16": (x, integers(9, 17, bits=8), draw(9, 2), None, None),
        "linear_fp8": (fp8[:3], scale[:3], fp8, scale.flatten(), None, torch.bfloat16),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    kept = checks[1:] if "fp8" in name else checks  # the first compares tensors by arithmetic that torch lacks for float8
    done = torch.library.opcheck(getattr(OPS, name).default, samples()[name], test_utils=kept)
    assert set(done.values()) == {"SUCCESS"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name: str) -> None:
    operands = samples()[name]
    op = getattr(OPS, name)
    torch.compiler.reset()  # or its limit of versions of one function is reached
    compiled = torch.compile(lambda *operands: op(*operands), fullgraph=True, backend="aot_eager")
    for got, twin in zip(*(y if isinstance(y, tuple) else (y,) for y in (compiled(*operands), op(*operands))), strict=True):
        assert torch.equal(got.float(), twin.float())
