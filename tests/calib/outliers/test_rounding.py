"""The rounding errors of a site against fake quantization written out in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.calib.outliers import rounding
from planish.calib.outliers.diagnosis import SCHEMES, TRANSFORMS
from planish.calib.outliers.difficulty import binned
from planish.calib.outliers.rounding import BITS, STRENGTHS, RoundingErrors, output_errors
from planish.quant.errors import PlanishError
from planish.quant.transforms.hadamard import hadamard


def fake(rows: Tensor, bits: int) -> Tensor:
    """Each row on its symmetric grid, by the definition."""
    top = 2 ** (bits - 1) - 1
    scale = rows.abs().amax(1, keepdim=True) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (rows / scale).round().clamp(-top - 1, top) * scale


def textbook(x: Tensor, keep: Tensor, weights: list[Tensor], scheme: str, transform: str, strength: float, over: Tensor) -> float:
    """||Y - Y_quantized|| / ||Y|| over the tokens `over`."""
    x, w = x.double(), torch.cat(weights).double()
    y = x @ w.T
    if transform in ("smooth", "both"):
        absmax = x[keep].abs().amax(0)
        s = absmax**strength / w.abs().amax(0) ** (1 - strength)
        s /= s.log().mean().exp()
        s = torch.where(x.abs().amax(0) > absmax, s.clamp(min=1), s)
        x, w = x / s, w * s
    if transform in ("hadamard", "both"):
        x, w = x @ hadamard(x.shape[1]), w @ hadamard(x.shape[1])
    torch.testing.assert_close(x @ w.T, y, rtol=1e-9, atol=1e-9)  # before rounding nothing has changed
    w_bits, x_bits = int(scheme[1]), int(scheme[3])
    off = fake(x, x_bits) @ fake(w, w_bits).T - y
    return float(off[over].norm() / y[over].norm())


def site(channels: int = 48, tokens: int = 64, seed: int = 0, sinks: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x_TC = torch.randn(tokens, channels, generator=generator) * torch.logspace(-1, 1, channels)
    keep_T = torch.ones(tokens, dtype=torch.bool)
    keep_T[:sinks] = False
    x_TC[:sinks, 3] = 2500
    return x_TC, keep_T, [torch.randn(rows, channels, generator=generator) / 10 for rows in (24, 8, 8)]


def numbers(found: RoundingErrors) -> list[float]:
    return [table[scheme][transform] for table in (found.errors, found.errors_every) for scheme in SCHEMES for transform in TRANSFORMS]


@pytest.mark.parametrize("channels", [48, 64, 100])
@pytest.mark.parametrize("sinks", [0, 2])
def test_like_the_textbook(channels: int, sinks: int) -> None:
    x_TC, keep_T, weights = site(channels, sinks=sinks)
    found = output_errors(x_TC, keep_T, weights)
    assert tuple(found.errors) == tuple(found.errors_every) == SCHEMES == tuple(BITS)
    everything = torch.ones_like(keep_T)
    for scheme in SCHEMES:
        assert tuple(found.errors[scheme]) == tuple(found.errors_every[scheme]) == TRANSFORMS
        for transform in TRANSFORMS:
            tried = {a: textbook(x_TC, keep_T, weights, scheme, transform, a, keep_T) for a in STRENGTHS}
            best = min(tried, key=lambda a: tried[a])
            if transform in ("smooth", "both"):
                assert found.strengths[scheme][transform] == best
            assert found.errors[scheme][transform] == pytest.approx(tried[best], rel=0.01)
            every = textbook(x_TC, keep_T, weights, scheme, transform, best, everything)
            assert found.errors_every[scheme][transform] == pytest.approx(every, rel=0.01)


def test_pieces_change_nothing() -> None:
    x_TC, keep_T, weights = site(tokens=50, sinks=1)
    whole = numbers(output_errors(x_TC, keep_T, weights))
    for tokens in (1, 7, 49):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rounding, "_PIECE_TOKENS", tokens)
            assert numbers(output_errors(x_TC, keep_T, weights)) == pytest.approx(whole, rel=1e-4)


def test_bfloat16_inputs_and_the_precision_that_is_set() -> None:
    x_TC, keep_T, weights = site()
    x_TC, weights = x_TC.bfloat16(), [w.bfloat16() for w in weights]
    before = x_TC.clone()
    found = output_errors(x_TC, keep_T, weights)
    assert found == output_errors(x_TC.float(), keep_T, [w.float() for w in weights])
    assert torch.equal(x_TC, before)
    assert torch.get_float32_matmul_precision() == "highest"


@given(seed=st.integers(0, 99), sinks=st.integers(0, 3))
def test_more_bits_err_less(seed: int, sinks: int) -> None:
    found = output_errors(*site(seed=seed, sinks=sinks))
    for transform in TRANSFORMS:
        assert 0 < found.errors["w8a8"][transform] < found.errors["w4a8"][transform] < found.errors["w4a4"][transform]


def test_hadamard_and_smoothing_repair_a_spiky_channel() -> None:
    x_TC = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    x_TC[:, 5] *= 80
    weights = [torch.randn(32, 64, generator=torch.Generator().manual_seed(1))]
    weights[0][:, 5] /= 80
    found = output_errors(x_TC, torch.ones(128, dtype=torch.bool), weights)
    for transform in ("smooth", "hadamard", "both"):
        assert found.errors["w8a8"][transform] < found.errors["w8a8"]["plain"] / 2
        assert max(found.channel_absmax_after[transform]) < x_TC.abs().max() / 3


def test_sinks_do_not_set_scales_and_count_only_in_every() -> None:
    clean = output_errors(*site(tokens=64))
    x_TC, keep_T, weights = site(tokens=64)
    x_TC, keep_T = torch.cat([x_TC, x_TC[:1]]), torch.cat([keep_T, torch.tensor([False])])
    found = output_errors(x_TC, keep_T, weights)
    for scheme in SCHEMES:
        assert found.errors[scheme] == pytest.approx(clean.errors[scheme], rel=1e-4)
    assert clean.errors == clean.errors_every
    assert found.errors != found.errors_every


def test_the_picture_after_each_transform() -> None:
    x_TC, keep_T, weights = site(576, tokens=40, sinks=1)
    found = output_errors(x_TC, keep_T, weights)
    assert {name: len(bins) for name, bins in found.channel_absmax_after.items()} == dict.fromkeys(("smooth", "hadamard", "both"), 192)
    rotated_C = (x_TC[keep_T].double() @ hadamard(576)).abs().amax(0)
    assert found.channel_absmax_after["hadamard"] == pytest.approx(binned(rotated_C), rel=1e-4)


def test_widths_without_a_hadamard_matrix_are_rotated_in_blocks() -> None:
    found = output_errors(*site(channels=92))
    assert all(math.isfinite(error) and error > 0 for error in numbers(found))
    assert found.errors["w4a4"]["hadamard"] != found.errors["w4a4"]["plain"]


def test_an_input_of_zeros_has_no_error() -> None:
    assert numbers(output_errors(torch.zeros(6, 12), torch.ones(6, dtype=torch.bool), [torch.ones(3, 12)])) == [0.0] * 24
    assert numbers(output_errors(torch.ones(6, 12), torch.ones(6, dtype=torch.bool), [torch.zeros(3, 12)])) == [0.0] * 24


def test_no_ordinary_token() -> None:
    with pytest.raises(PlanishError, match=r"3\.qkv: not one token"):
        output_errors(torch.ones(4, 12), torch.zeros(4, dtype=torch.bool), [torch.ones(3, 12)], "3.qkv")


def test_outputs_that_are_not_finite() -> None:
    with pytest.raises(PlanishError, match=r"3\.qkv: the outputs of its readers are not finite"):
        output_errors(torch.ones(4, 12), torch.ones(4, dtype=torch.bool), [torch.full((3, 12), torch.inf)], "3.qkv")
