"""The scale from second moments against its equation, channel by channel."""

import math

import pytest
import torch
from helpers_transforms import assert_layer_stays, normal, outliers
from hypothesis import given
from hypothesis import strategies as st

from planish.quant.transforms.factors import Scale
from planish.quant.transforms.scale_rms import rms_scale


def textbook(x: list[float], w: list[float], exponent: float) -> list[float]:
    """One channel after the other."""
    raw = [(math.sqrt(a) / math.sqrt(b)) ** (exponent / 2) for a, b in zip(x, w, strict=True)]
    mean = math.exp(sum(map(math.log, raw)) / len(raw))
    return [s / mean for s in raw]


@given(st.lists(st.tuples(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9)), min_size=1, max_size=9), st.floats(0, 1))
def test_the_equation(pairs: list[tuple[float, float]], exponent: float) -> None:
    x, w = [a for a, _ in pairs], [b for _, b in pairs]
    found_C = rms_scale(torch.tensor(x, dtype=torch.float64), torch.tensor(w, dtype=torch.float64), exponent)
    assert found_C.dtype is torch.float32
    torch.testing.assert_close(found_C.double(), torch.tensor(textbook(x, w, exponent), dtype=torch.float64), rtol=1e-6, atol=0)


def test_both_have_the_same_root_mean_squares_at_1_and_nothing_happens_at_0() -> None:
    x_TC, w_OC = outliers(50, 9), normal(4, 9)
    second_x_C, second_w_C = x_TC.square().mean(0), w_OC.square().sum(0)
    divisor_C = rms_scale(second_x_C, second_w_C, 1.0).double()
    ratio_C = (second_x_C / divisor_C**2) / (second_w_C * divisor_C**2)
    torch.testing.assert_close(ratio_C, ratio_C[:1].expand(9), rtol=1e-5, atol=0)
    assert torch.equal(rms_scale(second_x_C, second_w_C, 0.0), torch.ones(9))
    assert_layer_stays((Scale(divisor_C.float()),), 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dead_channels_keep_1_and_all_scales_are_usable(dtype: torch.dtype) -> None:
    x_C, w_C = torch.tensor([0, 4, 9, 0, 1e-38, 1e38], dtype=dtype), torch.tensor([1, 0, 4, 0, 1e38, 1e-38], dtype=dtype)
    found_C = rms_scale(x_C, w_C, 1.0)
    assert found_C[[0, 1, 3]].tolist() == [1, 1, 1]
    assert bool((found_C.isfinite() & (found_C > 0)).all())
    assert float(found_C[[2, 4, 5]].double().log().mean()) == pytest.approx(0, abs=1e-5)  # the size of those alive is kept
    assert torch.equal(rms_scale(torch.zeros(3), torch.ones(3), 1.0), torch.ones(3))
    assert rms_scale(torch.zeros(0), torch.zeros(0), 1.0).shape == (0,)
