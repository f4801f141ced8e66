"""Shifts against what they promise of each channel; OutlierTune's grid of integers."""

import pytest
import torch
from helpers_transforms import assert_layer_stays, normal, outliers
from hypothesis import given
from hypothesis import strategies as st

from planish.quant.formats import scale_and_zero
from planish.quant.transforms.factors import Scale, on_input, on_weight
from planish.quant.transforms.shift import mean, midrange, pre_executed
from planish.quant.transforms.smooth import smoothing_scale


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_ranges_become_symmetric_and_means_zero(tokens: int, channels: int, seed: int) -> None:
    x_TC = outliers(tokens, channels, seed) + 5
    middle = midrange(x_TC.amin(0), x_TC.amax(0))
    moved_TC = middle.on_input(x_TC)
    assert middle.center_C.dtype is torch.float32
    torch.testing.assert_close(moved_TC.amax(0), -moved_TC.amin(0), rtol=0, atol=1e-4)
    centred_TC = mean(x_TC.sum(0), tokens).on_input(x_TC)
    torch.testing.assert_close(centred_TC.mean(0), torch.zeros(channels, dtype=torch.float64), rtol=0, atol=1e-4)
    for chain in ((middle,), (mean(x_TC.sum(0), tokens),), pre_executed(x_TC.amin(0), x_TC.amax(0), 8)):
        assert_layer_stays(chain, channels)


def test_the_middle_and_the_mean() -> None:
    low_C, high_C = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 8.0])
    assert midrange(low_C, high_C).center_C.tolist() == [1, 5]
    assert mean(torch.tensor([6.0, -3.0]), 3).center_C.tolist() == [2, -1]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_pre_execution_is_static_quantization_per_channel(bits: int) -> None:
    """Rounding what arrives is quantizing x - z on each channel's own grid, and the integer product needs the weight's scale alone."""
    x_TC, w_OC = outliers(64, 7) + 3, normal(5, 7)
    low_C, high_C, most = x_TC.amin(0), x_TC.amax(0), 2 ** (bits - 1) - 1
    chain = pre_executed(low_C, high_C, bits)
    whole_TC = on_input(chain, x_TC).round()
    assert float(whole_TC.abs().max()) == most
    z_C, s_C = (low_C + high_C) / 2, (high_C - low_C) / 2 / most
    moved_OC, offset_O = on_weight(chain, w_OC)
    assert offset_O is not None
    rounded_TC = ((x_TC - z_C) / s_C).round() * s_C + z_C
    torch.testing.assert_close(whole_TC @ moved_OC.T + offset_O, rounded_TC @ w_OC.T, rtol=0, atol=1e-4)


@given(st.integers(2, 20), st.integers(1, 9), st.integers(0, 99))
def test_shift_and_smooth_with_strength_1_are_pre_execution(tokens: int, channels: int, seed: int) -> None:
    """As paper-outliertune has it: behind them one fixed scale for all channels gives each its own grid; the codes are OutlierTune's."""
    x_TC = outliers(tokens, channels, seed) + 5
    low_C, high_C = x_TC.amin(0), x_TC.amax(0)
    smoothed_TC = x_TC / smoothing_scale((high_C - low_C) / 2, torch.ones(channels), 1.0)
    centred_TC = midrange(smoothed_TC.amin(0), smoothed_TC.amax(0)).on_input(smoothed_TC)
    static, _ = scale_and_zero(centred_TC.amin(), centred_TC.amax(), 8, symmetric=True)
    expected_TC = on_input(pre_executed(low_C, high_C, 8), x_TC)
    torch.testing.assert_close(centred_TC / static, expected_TC, rtol=0, atol=1e-3 + 1e-4 * float((x_TC.abs().amax(0) / (high_C - low_C)).amax()))


def test_a_constant_channel_gets_a_middling_divisor() -> None:
    _, scale = pre_executed(torch.tensor([5.0, -7.0, -28.0]), torch.tensor([5.0, 7.0, 28.0]), 4)
    assert isinstance(scale, Scale)
    torch.testing.assert_close(scale.divisor_C, torch.tensor([2.0, 1.0, 4.0]))
    _, scale = pre_executed(torch.zeros(2), torch.zeros(2), 4)
    assert isinstance(scale, Scale)
    assert scale.divisor_C.tolist() == [1, 1]
