"""The C++ passes compute what torch's operations do; without a compiler the operators go without them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from planish.quant.kernels import cpu, native, pack_nibbles

pytestmark = pytest.mark.skipif(native.found().library is None, reason=native.found().why)
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0, 32), (1, 1), (3, 37), (600, 64), (40, 600)]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], object]:
    """Runs something with torch's own operations."""

    def run(what: Callable[[], object]) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(native, "found", lambda: native.Found(None, "test"))
            return what()

    return run


@pytest.fixture
def fresh() -> Iterator[None]:
    native.found.cache_clear()
    yield
    native.found.cache_clear()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", [(8, True, 1.0), (8, False, 1.0), (4, True, 0.8), (5, False, 0.9)])
def test_quantize(dtype: torch.dtype, shape: tuple[int, int], grid: tuple[int, bool, float], plain: Callable[..., object]) -> None:
    for x in (draw(*shape, dtype=dtype), draw(shape[0], shape[1] + 3, dtype=dtype)[:, 1:-2]):
        x[1:2] = 0
        run = lambda x=x: cpu.quantize_per_token(x, *grid, False)  # noqa: E731
        for found, twin in zip(run(), plain(run), strict=True):  # type: ignore[call-overload]
            assert torch.equal(found, twin)


def test_codes_of_many_values_and_scales_are_those_of_a_true_division(plain: Callable[..., object]) -> None:
    """Ties and their neighbours: the quotient is corrected to the last bit."""
    halves = torch.arange(-127, 127) + 0.5
    rows = [torch.cat([halves * s, (halves * s).nextafter(torch.tensor(0.0)), torch.tensor([127 * s, -127 * s])]) for s in (1.0, 0.1, 3e-5, 7.77e20)]
    x = torch.cat([torch.stack(rows), draw(500, len(rows[0])) * draw(500, 1, seed=1).exp()])
    run = lambda: cpu.quantize_per_token(x, 8, True, 1.0, False)  # noqa: E731
    assert torch.equal(run()[0], plain(run)[0])  # type: ignore[index]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_token_that_is_not_finite(dtype: torch.dtype, bad: float) -> None:
    x = draw(3, 32, dtype=dtype)
    x[1, 7] = bad
    for symmetric in (True, False):
        assert cpu.quantize_per_token(x, 8, symmetric, 1.0, False)[1].isnan().flatten().tolist() == [False, True, False]
    normal = native.rms_norm(x, draw(32, seed=1, dtype=dtype), 1e-6)
    assert normal is not None
    assert normal[1].isnan().any()
    assert normal[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_gate(dtype: torch.dtype, shape: tuple[int, int], plain: Callable[..., object]) -> None:
    x, other, weight = draw(*shape, dtype=dtype), draw(*shape, seed=1, dtype=dtype), draw(shape[1], seed=2, dtype=dtype)
    exact = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    normal = native.rms_norm(x, weight, 1e-5)
    assert normal is not None
    torch.testing.assert_close(normal.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    for run in (
        lambda: cpu.rms_norm_quantize(x, weight, 1e-5, 8, True, 1.0, False),
        lambda: cpu.silu_mul_quantize(x, other, 8, False, 1.0, False),
    ):
        found, twin = run(), plain(run)
        assert float((found[0].int() - twin[0].int()).abs().float().mean() if x.numel() else 0) < 0.01  # type: ignore[index]
        torch.testing.assert_close(found[1], twin[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)  # type: ignore[index]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static", [False, True])
def test_finish(dtype: torch.dtype, static: bool) -> None:
    x, sums, bias = draw(37, 33), draw(33, seed=1), draw(33, seed=2).bfloat16()
    scale, zero = (draw(1 if static else 37, 1, seed=3), torch.arange(1 if static else 37, dtype=torch.int32)[:, None])
    exact = (x.double() - zero * sums.double()) * scale.double() + bias.double()
    found = native.finish(x, scale, zero, sums, bias, dtype)
    assert found is not None
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    alone = native.finish(x, None, None, None, None, dtype)
    assert alone is not None
    assert torch.equal(alone, x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
def test_dequantize(dtype: torch.dtype, zeros: bool, plain: Callable[..., object]) -> None:
    codes = torch.randint(-8, 8, (21, 24), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale, zero = draw(21, 3), torch.randint(-8, 8, (21, 3)).float() if zeros else None
    found = native.dequantize(pack_nibbles(codes), scale, zero, dtype)
    twin = (codes.reshape(21, 3, 8) - (0 if zero is None else zero[:, :, None])) * scale[:, :, None]
    assert found is not None
    assert torch.equal(found, twin.flatten(1).to(dtype))


def test_it_does_not_apply_to_other_dtypes_and_strides() -> None:
    grid = cpu.grid(8, True, 1.0)
    assert native.quantize(draw(3, 8, dtype=torch.float16), grid) is None
    assert native.quantize(draw(8, 3).T, grid) is None
    assert native.rms_norm(draw(3, 8, dtype=torch.bfloat16), draw(8), 1e-5) is None


@pytest.mark.parametrize(("compiler", "why"), [("", "PLANISH_COMPILER='' is none"), ("no-such-compiler", "is none"), ("false", "failed")])
@pytest.mark.usefixtures("fresh")
def test_without_a_compiler(compiler: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_COMPILER", compiler)
    assert native.found().library is None
    assert why in native.found().why
    assert cpu.quantize_per_token(draw(3, 8), 8, True, 1.0, False)[0].shape == (3, 8)


@pytest.mark.usefixtures("fresh")
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path))
    for _ in range(2):
        assert native.found().library is not None
        native.found.cache_clear()
        (library,) = (tmp_path / "kernels").iterdir()
        assert library.suffix == ".so"
        library.touch()
        written = library.stat().st_mtime_ns
    assert library.stat().st_mtime_ns == written


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 9, 512, 64), (2, 3, 7, 6), (3, 1, 1, 2), (1, 2, 0, 4)])
def test_rotary(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """Bit for bit, of a view into a product of all heads and of what lies densely, with angles for every batch or for all."""
    batches, heads, tokens, width = shape
    view = draw(batches, tokens, (heads + 2) * width, dtype=dtype)[..., width:-width].view(batches, tokens, heads, width).transpose(1, 2)
    for x in (view, view.contiguous()):
        for many in (1, batches):
            cos, sin = (draw(many, tokens, width, seed=seed, dtype=dtype) for seed in (1, 2))
            found = native.rotary(x, cos, sin)
            one, two = x.chunk(2, -1)
            assert found is not None
            assert torch.equal(found, x * cos[:, None] + torch.cat([-two, one], -1) * sin[:, None])
    assert native.rotary(view, cos[..., :-1], sin[..., :-1]) is None
    assert native.rotary(view, cos.to(torch.float16), sin) is None
