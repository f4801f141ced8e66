"""Shifts against what they promise of each channel; OutlierTune's grid of integers."""

import torch
from helpers_transforms import assert_layer_stays, outliers
from hypothesis import given
from hypothesis import strategies as st

from planish.quant.formats import scale_and_zero
from planish.quant.transforms.factors import Shift
from planish.quant.transforms.shift import midrange
from planish.quant.transforms.smooth import smoothing_scale


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_ranges_become_symmetric_and_means_zero(tokens: int, channels: int, seed: int) -> None:
    x_TC = outliers(tokens, channels, seed) + 5
    middle, mean = midrange(x_TC.amin(0), x_TC.amax(0)), Shift(x_TC.mean(0))
    moved_TC = middle.on_input(x_TC)
    assert middle.center_C.dtype is torch.float32
    torch.testing.assert_close(moved_TC.amax(0), -moved_TC.amin(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(mean.on_input(x_TC).mean(0), torch.zeros(channels, dtype=torch.float64), rtol=0, atol=1e-4)
    for shift in (middle, mean):
        assert_layer_stays((shift,), channels)


def test_the_middle() -> None:
    assert midrange(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 8.0])).center_C.tolist() == [1, 5]


@given(st.integers(2, 20), st.integers(1, 9), st.integers(0, 99))
def test_shift_and_smooth_with_strength_1_are_pre_execution(tokens: int, channels: int, seed: int) -> None:
    """As paper-outliertune has it: behind them one fixed scale for all channels gives each its own grid; the codes are OutlierTune's,
    (x - z) / s with z the middle of a channel's range and s half of it over the largest code."""
    x_TC = outliers(tokens, channels, seed) + 5
    low_C, high_C = x_TC.amin(0), x_TC.amax(0)
    smoothed_TC = x_TC / smoothing_scale((high_C - low_C) / 2, torch.ones(channels), 1.0)
    centred_TC = midrange(smoothed_TC.amin(0), smoothed_TC.amax(0)).on_input(smoothed_TC)
    static, _ = scale_and_zero(centred_TC.amin(), centred_TC.amax(), 8, symmetric=True)
    expected_TC = (x_TC - (low_C + high_C) / 2) / ((high_C - low_C) / 2 / 127)
    torch.testing.assert_close(centred_TC / static, expected_TC, rtol=0, atol=1e-3 + 1e-4 * float((x_TC.abs().amax(0) / (high_C - low_C)).amax()))
