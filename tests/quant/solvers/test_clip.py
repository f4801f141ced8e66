"""The clip search against every candidate tried one by one."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers_solvers import FORMATS, clip_losses, format_name, loss, plain_grid, weights

from planish.quant import pieces
from planish.quant.errors import PlanishError
from planish.quant.formats import WeightFormat, fitted
from planish.quant.kernels import native
from planish.quant.solvers import Clip, Rtn
from planish.quant.solvers.clip import fit_grid


def rows(w_OI, fmt):
    if fmt.granularity == "tensor":
        return w_OI.reshape(1, -1)
    return w_OI.reshape(-1, fmt.group_size or w_OI.shape[1])


@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [Clip(), Clip(grid=17, shrink=0.5, power=1.3)], ids=["default", "own"])
def test_fast_search_finds_the_twins_argmin(fmt, scale_dtype, clip):
    w_OI = weights(5, 48)
    w_OI[0, 3] = 1.0
    scale_dtype = fitted(w_OI, fmt, scale_dtype)
    scale, zero = fit_grid(w_OI, fmt, clip, scale_dtype)
    for r, w in enumerate(rows(w_OI, fmt)):
        best = min(clip_losses(w, fmt, clip, scale_dtype))
        found = loss(w, scale.flatten()[r], None if zero is None else zero.flatten()[r], fmt.kind, clip.power)
        assert found == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("clip", [Clip(), Clip(grid=31, shrink=1.0, power=1.0), Clip(power=7.5)], ids=["default", "linear", "steep"])
@pytest.mark.parametrize("compiled", [True, False], ids=["one pass", "torch"])
@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_float32_search_is_as_good_as_float64(fmt, compiled, clip, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "clip_search", lambda *_: None)
    w_OI = weights(9, 576, seed=3)
    w_OI[4] = 0
    scale_dtype = fitted(w_OI, fmt, torch.bfloat16)
    scale, zero = fit_grid(w_OI.float(), fmt, clip, scale_dtype)
    for r, w in enumerate(rows(w_OI, fmt)):
        best = min(clip_losses(w, fmt, clip, scale_dtype))
        found = loss(w, scale.flatten()[r].double(), None if zero is None else zero.flatten()[r].double(), fmt.kind, clip.power)
        assert found <= best * (1 + 1e-4)
        if r > 40:
            break


@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_chunks_do_not_change_the_result(fmt, monkeypatch):
    w_OI = weights(11, 48).float()
    whole = fit_grid(w_OI, fmt, Clip(), torch.float32)
    monkeypatch.setattr(pieces, "CACHED", 40)
    parts = fit_grid(w_OI, fmt, Clip(), torch.float32)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_no_clip_covers_the_range(fmt):
    w_OI = weights(5, 48)
    torch.testing.assert_close(fit_grid(w_OI, fmt, None, torch.float16), plain_grid(w_OI, fmt, torch.float16))


@hypothesis.given(out=st.integers(1, 5), size=st.integers(1, 19), bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 99))
@hypothesis.settings(max_examples=30, deadline=None)
def test_clip_never_loses_to_no_clip(out, size, bits, symmetric, seed):
    fmt = WeightFormat(bits=bits, symmetric=symmetric)
    w_OI = weights(out, size, seed)
    w_OI[0] = 0
    clipped, plain = fit_grid(w_OI, fmt, Clip(), torch.float32), plain_grid(w_OI, fmt, torch.float32)
    for r, w in enumerate(w_OI):
        ours, theirs = (loss(w, g[0][r], None if g[1] is None else g[1][r], bits, 2.4) for g in (clipped, plain))
        assert ours <= theirs * (1 + 1e-9)


def test_tiny_and_huge_rows_are_clipped_like_others():
    w_OI = weights(1, 300).float() * torch.tensor([[1.0], [2.0**-100], [2.0**100]])
    scale, _ = fit_grid(w_OI, WeightFormat(bits=4), Clip(), torch.float32)
    torch.testing.assert_close(scale[:, 0] / torch.tensor([1.0, 2.0**-100, 2.0**100]), scale[:1, 0].expand(3))


def test_scales_are_exact_in_the_stored_dtype():
    weight = Rtn(clip=Clip()).solve(weights(8, 24).float(), WeightFormat(bits=4), None, torch.float16).weight
    assert torch.equal(weight.scale, weight.scale.half().float())


@pytest.mark.parametrize("bad", [{"grid": 0}, {"shrink": 0.0}, {"shrink": 1.1}, {"power": 0.0}, {"power": float("inf")}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(PlanishError, match=next(iter(bad))):
        Clip(**bad)


def test_candidates_follow_the_definition():
    assert Clip().factors() == pytest.approx([1 - i / 100 for i in range(80)])
    assert len(Clip(grid=10, shrink=0.25).factors()) == 3
    assert min(Clip(grid=7, shrink=1.0).factors()) > 0
