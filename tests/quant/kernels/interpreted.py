"""The Triton kernels in Triton's interpreter, on a CPU, against the operators' CPU implementations.

Run by test_triton.py in a process whose TRITON_INTERPRET is 1: Triton looks at it once, when it is imported.

In float32 and float16: the interpreter's bfloat16 products are wrong, and its casts to bfloat16 truncate.
"""

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from planish.quant.kernels import pack_nibbles, tuning
from planish.quant.solvers.columns import Block, _works, launch, one_by_one
from planish.quant.transforms.hadamard import hadamard_block

OPS = torch.ops.planish
SMALL = tuning.Config(16, 32, 32, 4, 2)


@pytest.fixture(scope="module")
def cuda() -> ModuleType:
    """The launches, with kernels that the interpreter runs."""
    return importlib.import_module("planish.quant.kernels.cuda")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def integers(*shape: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def same(got: tuple[Tensor, ...], twin: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, twin, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("bits", "symmetric", "packed"), [(8, True, False), (8, False, False), (4, True, True), (4, False, True), (5, False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 46), (1, 64), (0, 32)])
def test_quantize_bit_exact(cuda: ModuleType, bits: int, symmetric: bool, packed: bool, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = draw(*shape, dtype=dtype)
    x[1:2] = 0
    same(cuda.quantize_per_token(x, bits, symmetric, 0.9, packed), OPS.quantize_per_token(x, bits, symmetric, 0.9, packed))


def test_quantize_odd_width_strides_and_not_finite(cuda: ModuleType) -> None:
    wide = draw(4, 35)
    for x in (wide[:, 1:34], wide[:, ::2], wide.T):
        same(cuda.quantize_per_token(x, 8, False, 1.0, False), OPS.quantize_per_token(x, 8, False, 1.0, False))
    for bad in (torch.nan, torch.inf, -torch.inf):
        wide[2, 5] = bad
        codes, scale, _ = cuda.quantize_per_token(wide, 8, True, 1.0, False)
        assert scale.isnan().flatten().tolist() == [False, False, True, False]
        assert torch.equal(codes[:2], OPS.quantize_per_token(wide, 8, True, 1.0, False)[0][:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused_with_norm_and_silu(cuda: ModuleType, dtype: torch.dtype) -> None:
    x, gate, weight = draw(4, 48, dtype=dtype), draw(4, 48, seed=1, dtype=dtype), draw(48, seed=2, dtype=dtype)
    for name, operands in {"rms_norm_quantize": (x, weight, 1e-5), "silu_mul_quantize": (gate, x)}.items():
        got, twin = (getattr(where, name)(*operands, 8, False, 1.0, False) for where in (cuda, OPS))
        assert int((got[0].int() - twin[0].int()).abs().max()) <= 1  # sums in another order
        torch.testing.assert_close(got[1], twin[1], rtol=2e-3, atol=0)


@pytest.mark.parametrize(("width", "block"), [(48, 48), (96, 24), (576, 576), (40, 40)])
@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_hadamard(cuda: ModuleType, width: int, block: int, signs: bool, packed: bool) -> None:
    x, s = draw(2, width), draw(width, seed=1).sign() if signs else None
    assert block <= hadamard_block(width)
    bits = 4 if packed else 8
    got, twin = (where.hadamard_quantize(x, s, block, bits, False, 1.0, packed) for where in (cuda, OPS))
    assert float((got[0] != twin[0]).float().mean()) < 0.01
    torch.testing.assert_close(got[1], twin[1], rtol=1e-5, atol=0)
    assert torch.equal(got[2], twin[2])


@pytest.mark.parametrize(("width", "size", "shared"), [(48, 12, False), (48, 12, True), (96, 96, False), (60, 20, False), (224, 112, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of infinite inputs
def test_blocks(cuda: ModuleType, width: int, size: int, shared: bool, dtype: torch.dtype, packed: bool) -> None:
    """An odd number of blocks too, whose middle one lies in both halves; more tokens than a program takes; one that is not finite."""
    x, matrix = draw(35, width + 3, dtype=dtype)[:, 1:-2], draw(1 if shared else width // size, size, size, seed=1, dtype=dtype) / 8
    x[0], x[17, 3] = 0, torch.inf
    grid = (4 if packed else 8, packed, 0.9, packed)
    got, twin = cuda.blocks_quantize(x, matrix, *grid, few=0), OPS.blocks_quantize(x, matrix, *grid)
    fine = torch.arange(35) != 17
    assert float((got[0] != twin[0])[fine].float().mean()) < 0.01
    torch.testing.assert_close(got[1], twin[1], rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=0, equal_nan=True)
    assert got[1].isnan().flatten().tolist() == (~fine).tolist()
    if not packed:
        assert int((got[2] - twin[2])[fine].abs().max()) <= (dtype == torch.float16)


@pytest.mark.parametrize("name", ["linear_w8a8", "linear_w4a8", "linear_w4a4"])
@pytest.mark.parametrize(("tokens", "columns", "inputs"), [(1, 9, 34), (17, 40, 130), (0, 8, 32), (33, 33, 64)])
@pytest.mark.parametrize("extras", [False, True])
def test_integer_linear(cuda: ModuleType, name: str, tokens: int, columns: int, inputs: int, extras: bool) -> None:
    x_bits, w_bits = (4 if name == "linear_w4a4" else 8), (8 if name == "linear_w8a8" else 4)
    x, weight = integers(tokens, inputs, bits=x_bits), integers(columns, inputs, bits=w_bits, seed=1)
    x_scale, w_scale = draw(tokens, 1).abs(), draw(columns, seed=2).abs()
    zero = integers(tokens, 1, bits=x_bits, seed=4).int() if extras else None
    beside = (draw(columns, seed=3), draw(tokens, 5, seed=5), draw(columns, 5, seed=6)) if extras else (None, None, None)
    grid = (x_scale, zero, pack_nibbles(weight) if w_bits == 4 else weight, w_scale, weight.sum(1, dtype=torch.int32))
    operands = (pack_nibbles(x) if x_bits == 4 else x, *grid, *beside, torch.float32)
    torch.testing.assert_close(cuda.integer_linear(name, *operands, config=SMALL), getattr(OPS, name)(*operands), rtol=1e-5, atol=1e-3)


def test_static_grid(cuda: ModuleType) -> None:
    x, weight = integers(5, 32, bits=8), integers(8, 32, bits=8, seed=1)
    operands = (x, torch.full((1, 1), 0.001), torch.full((1, 1), 3, dtype=torch.int32), weight, draw(8).abs(), weight.sum(1, dtype=torch.int32))
    rest = (None, None, None, torch.float16)
    assert torch.equal(cuda.integer_linear("linear_w8a8", *operands, *rest, config=SMALL), OPS.linear_w8a8(*operands, *rest))


def test_operands_lie_anyhow(cuda: ModuleType) -> None:
    """Every second value of tensors twice as large; and zero points for tokens whose scale is 1."""

    def spread(x: Tensor) -> Tensor:
        there = (slice(None, None, 2),) * x.ndim
        wide = x.new_zeros([2 * size for size in x.shape])
        wide[there] = x
        return wide[there]

    x, weight, zero = integers(5, 32, bits=8), integers(8, 32, bits=8, seed=1), integers(5, 1, bits=4).int()
    plain = (x, draw(5, 1).abs(), zero, weight, draw(8).abs(), weight.sum(1, dtype=torch.int32), draw(8), draw(5, 3), draw(8, 3))
    expected = OPS.linear_w8a8(*plain, torch.float32)
    torch.testing.assert_close(cuda.integer_linear("linear_w8a8", *map(spread, plain), torch.float32, config=SMALL), expected, rtol=1e-5, atol=1e-3)
    ones = (x, None, *plain[2:], torch.float32)
    torch.testing.assert_close(cuda.integer_linear("linear_w8a8", *ones, config=SMALL), OPS.linear_w8a8(*ones), rtol=1e-5, atol=1e-3)
    wide, packed = draw(5, 32), pack_nibbles(integers(8, 32, bits=4))
    grid = (wide, packed, draw(8, 2).abs(), draw(8, 2, seed=1), draw(8))
    torch.testing.assert_close(cuda.linear_w4a16(*map(spread, grid), config=SMALL), OPS.linear_w4a16(*grid), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("groups", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("tokens", [1, 18])
def test_w4a16(cuda: ModuleType, groups: int, asymmetric: bool, tokens: int) -> None:
    inputs = {3: 192, 12: 432}.get(groups, 256)  # 432: groups of 36, which no step fits
    weight, scale, x = integers(40, inputs, bits=4), draw(40, groups).abs(), draw(tokens, inputs)
    zero = integers(40, groups, bits=4, seed=1).float() if asymmetric else None
    operands = (x, pack_nibbles(weight), scale, zero, draw(40, seed=2))
    torch.testing.assert_close(cuda.linear_w4a16(*operands, config=SMALL), OPS.linear_w4a16(*operands), rtol=1e-4, atol=1e-2)


def test_no_tokens_of_float8(cuda: ModuleType) -> None:
    (x, x_scale), (weight, w_scale) = OPS.quantize_fp8(draw(0, 32)), OPS.quantize_fp8(draw(16, 32))
    assert cuda.linear_fp8(x, x_scale, weight, w_scale.flatten(), None, torch.float32).shape == (0, 16)


def test_every_byte_means_what_it_should(cuda: ModuleType) -> None:
    """One weight row for every byte, inputs of one 1: the nibble tricks of all kernels over all byte values."""
    packed = torch.arange(-128, 128).to(torch.int8).reshape(256, 1).repeat(1, 16)
    codes = torch.stack([(packed[:, 0] << 4) >> 4, packed[:, 0] >> 4], 1).float()
    x = torch.zeros(2, 32)
    x[0, 0] = x[1, 16] = 1
    assert torch.equal(cuda.linear_w4a16(x, packed, torch.ones(256, 1), None, None, config=SMALL).T, codes)
    one = torch.ones(2, 1)
    rest = (one, None, packed, torch.ones(256), None, None, None, None, torch.float32)
    assert torch.equal(cuda.integer_linear("linear_w4a8", x.to(torch.int8), *rest, config=SMALL).T, codes)
    assert torch.equal(cuda.integer_linear("linear_w4a4", pack_nibbles(x.to(torch.int8)), *rest, config=SMALL).T, codes)


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (17, 40)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("grid", ["of each weight", "of each row", "of all"])
def test_columns(columns: int, rows: int, bits: int, zero: bool, grid: str) -> None:
    """A block from the middle of a weight, as gptq.Columns has it; on any grid, with the loop's codes."""
    size = {"of each weight": (columns, rows), "of each row": (1, rows), "of all": (1, 1)}[grid]
    shares_KK = (0.1 * draw(columns + 9, columns + 9)).tril(-1)[9:, 9:]
    scale_KO, zero_KO = 0.1 + draw(*size, seed=1).abs().expand(columns, rows), integers(*size, bits=4).float().expand(columns, rows)
    blocks = [
        Block(draw(columns, rows), draw(columns, rows, seed=2), draw(columns, rows), codes, shares_KK, scale_KO, zero_KO if zero else None)
        for codes in (integers(columns, rows, bits=8), integers(columns, rows, bits=8, seed=1))
    ]
    launch(blocks[0], bits)
    one_by_one(blocks[1], bits)
    assert float((blocks[0].codes_KO != blocks[1].codes_KO).float().mean()) < 0.01  # sums have another order
    same = blocks[0].codes_KO == blocks[1].codes_KO
    torch.testing.assert_close(blocks[0].deviations_KO[same], blocks[1].deviations_KO[same], rtol=1e-4, atol=1e-4)


def test_columns_are_tried_before_they_are_taken() -> None:
    assert _works(torch.device("cpu"))
