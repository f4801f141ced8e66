"""The operators on tiles, by AMX, by VNNI and by AVX2, against float64 and against the operators that they stand for."""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_native import NO_AVX512, compiled
from torch import Tensor

from planish.quant.kernels import cpu, tiles
from planish.quant.kernels.native import Found, found

pytestmark = pytest.mark.skipif(not tiles.engine(), reason="no compiler, or no AVX2")
OPS = torch.ops.planish
ENGINE = tiles.engine
AVX2, VNNI, AMX = 1, 2, 3
SHIM = Path(__file__).with_name("emulated_amx.h")
OPTIONS = {AVX2: NO_AVX512, AMX: ("-D__AMX_INT8__", "-include", str(SHIM))}  # AMX's instructions in software


@pytest.fixture(scope="module", params=[pytest.param(AVX2, id="AVX2"), pytest.param(VNNI, id="VNNI"), pytest.param(AMX, id="AMX")])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, ctypes.CDLL | None]:
    """An engine and the passes that have it."""
    kind, own = request.param, ENGINE()
    if kind == own or (kind, own) == (VNNI, AMX):
        return kind, found().library
    if kind == VNNI:
        pytest.skip("no AVX512-VNNI")
    return kind, compiled(tmp_path_factory.mktemp("passes"), *OPTIONS[kind])


@pytest.fixture(autouse=True)
def multiplied_by(engine: tuple[int, ctypes.CDLL | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights lie alike for all."""
    monkeypatch.setattr(tiles, "found", lambda: Found(engine[1], "for this test"))
    monkeypatch.setattr(tiles, "engine", lambda: engine[0])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).bfloat16()


def weight(outputs: int, inputs: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and sums."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (outputs, inputs), generator=g).to(torch.int8)
    return codes, torch.rand(outputs, generator=g) * 0.01 + 0.001, codes.sum(1, dtype=torch.int32)


def exact(x: Tensor, codes: Tensor, scale: Tensor, grid: tuple[int, bool, float]) -> Tensor:
    """In float64."""
    q, x_scale, zero = cpu.quantize_per_token(x, *grid, False)
    integers = q.double() if grid[1] else q.double() - zero
    return (integers * x_scale.double()) @ (codes.double() * scale.double()[:, None]).T


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 33, 513, 1030])
@pytest.mark.parametrize("shape", [(1, 1), (9, 34), (16, 64), (33, 100), (48, 129)])
@pytest.mark.parametrize("grid", [(8, True, 1.0), (8, False, 1.0), (4, True, 0.8)])
def test_linear_against_float64(tokens: int, shape: tuple[int, int], grid: tuple[int, bool, float]) -> None:
    codes, scale, sums = weight(*shape)
    wide = draw(tokens, shape[1] + 5)
    bias = draw(shape[0], seed=2).float()
    for x in (wide[:, 2:-3], wide[:, 2:-3].contiguous()):
        x[:1] = 0
        y = OPS.linear_tiles(x, tiles.tiles(codes), scale, sums, bias, *grid, cpu.LEAST)
        twin = exact(x, codes, scale, grid) + bias.double()
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), twin, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 17, 520])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_mlp_is_what_its_parts_make(tokens: int, symmetric: bool, biases: bool) -> None:
    hidden, inner, grid = 40, 48, (8, symmetric, 1.0)
    (both, both_scale, both_sum), (down, down_scale, down_sum) = weight(2 * inner, hidden), weight(hidden, inner, seed=2)
    x, b, c = draw(tokens, hidden), draw(2 * inner, seed=3).float() if biases else None, draw(hidden, seed=4).float() if biases else None
    operands = (x, tiles.tiles(both), both_scale, both_sum, b, *grid, tiles.tiles(down), down_scale, down_sum, c, *grid, cpu.LEAST)
    made = OPS.linear_tiles(x, tiles.tiles(both), both_scale, both_sum, b, *grid, cpu.LEAST)
    inside = torch.nn.functional.silu(made[:, :inner]) * made[:, inner:]
    twin = OPS.linear_tiles(inside, tiles.tiles(down), down_scale, down_sum, c, *grid, cpu.LEAST)
    y = OPS.mlp_tiles(*operands)
    assert y.shape == twin.shape
    assert float((y.double() - twin.double()).norm()) <= 5e-3 * float(twin.double().norm())  # the last bit of exp moves a code now and then


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_token_that_is_not_finite_spoils_its_own_outputs_only(symmetric: bool) -> None:
    codes, scale, sums = weight(16, 64)
    x = draw(20, 64)
    x[3, 5], x[17, 0] = torch.nan, torch.inf
    y = OPS.linear_tiles(x, tiles.tiles(codes), scale, sums, None, 8, symmetric, 1.0, cpu.LEAST)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [3, 17]
    assert y[[3, 17]].isnan().all()


def test_opcheck_and_one_graph() -> None:
    codes, scale, sums = weight(32, 64)
    one = (draw(5, 64), tiles.tiles(codes), scale, sums, None, 8, True, 1.0)
    torch.library.opcheck(OPS.linear_tiles, (*one, cpu.LEAST))
    down, down_scale, down_sum = weight(64, 16)
    torch.library.opcheck(OPS.mlp_tiles, (*one, tiles.tiles(down), down_scale, down_sum, None, 8, True, 1.0, cpu.LEAST))


def test_a_ceiling_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ENGINE.__wrapped__
    for best, kept in ((3, (2, 2, 0, 0, 0)), (2, (2, 2, 0, 0, 0)), (1, (1, 1, 1, 0, 1)), (0, (0, 0, 0, 0, 0))):
        monkeypatch.setattr(tiles, "found", lambda best=best: Found(SimpleNamespace(planish_engine=lambda: best), ""))  # type: ignore[misc]
        for ceiling, expected in zip(("AVX512_CORE_VNNI", "avx512_core_bf16", "AVX2", "SSE41", "AVX2_VNNI"), kept, strict=True):
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", ceiling)
            assert engine() == expected
