"""The operators on tiles, by AMX and by VNNI, against float64 and against the operators that they stand for."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from planish.quant.kernels import cpu, tiles
from planish.quant.kernels.native import FLAGS, SOURCE, Found, found

pytestmark = pytest.mark.skipif(not tiles.engine(), reason="no compiler, or no AVX512-VNNI")
OPS = torch.ops.planish
ENGINE = tiles.engine


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The passes with AMX's instructions in software."""
    made = tmp_path_factory.mktemp("emulated") / "native.so"
    compiler = found().why.rpartition(" ")[2]
    shim = Path(__file__).with_name("emulated_amx.h")
    subprocess.run([compiler, *FLAGS, "-D__AMX_INT8__", "-include", str(shim), str(SOURCE), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))


@pytest.fixture(autouse=True, params=[pytest.param(1, id="VNNI"), pytest.param(2, id="AMX")])
def multiplied_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights lie alike for both."""
    if request.param > ENGINE():
        library = request.getfixturevalue("emulated")
        monkeypatch.setattr(tiles, "found", lambda: Found(library, "emulated"))
    monkeypatch.setattr(tiles, "engine", lambda: request.param)


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
    monkeypatch.setattr(tiles, "found", found)
    engine = ENGINE.__wrapped__
    best = engine()
    for ceiling, least in (("AVX512_CORE_VNNI", 1), ("avx512_core_bf16", 1), ("AVX512_CORE", 0), ("AVX2", 0)):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", ceiling)
        assert engine() == min(best, least)
