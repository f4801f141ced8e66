"""The scale of SmoothQuant against its equation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planish.quant.errors import PlanishError
from planish.quant.transforms import STEPS, Smooth
from planish.quant.transforms.smooth import smoothing_scale

extremes = st.sampled_from([0.0, 1e-38, 1.0, 1e30])
sizes = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)


@given(sizes, st.floats(0, 1), st.integers(0, 99))
def test_equation_4_up_to_a_common_factor(x: list[float], strength: float, seed: int) -> None:
    x_C = torch.tensor(x)
    w_C = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) + 0.01
    found = smoothing_scale(x_C, w_C, strength).double()
    expected = x_C.double() ** strength / w_C.double() ** (1 - strength)
    ratio = found / expected
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4)
    assert found.log().mean().item() == pytest.approx(0, abs=1e-4)


def test_ends() -> None:
    x_C, w_C = torch.tensor([1.0, 4.0]), torch.tensor([8.0, 2.0])
    assert torch.allclose(smoothing_scale(x_C, w_C, 1.0), torch.tensor([0.5, 2.0]))
    assert torch.allclose(smoothing_scale(x_C, w_C, 0.0), torch.tensor([0.5, 2.0]))
    assert torch.allclose(smoothing_scale(x_C, w_C, 0.5), torch.tensor([0.5, 2.0]))
    flat = smoothing_scale(torch.full((3,), 7.0), torch.full((3,), 0.1), 0.5)
    assert torch.allclose(flat, torch.ones(3))


@given(st.lists(extremes, min_size=1, max_size=6), st.lists(extremes, min_size=6, max_size=6))
def test_dead_channels_keep_1_and_all_scales_are_usable(x: list[float], w: list[float]) -> None:
    x_C, w_C = torch.tensor(x), torch.tensor(w[: len(x)])
    for strength in (0.0, 0.5, 1.0):
        found = smoothing_scale(x_C, w_C, strength)
        assert bool((found.isfinite() & (found > 0)).all())
        assert bool((found[(x_C == 0) | (w_C == 0)] == 1).all())


def test_dead_channels_and_the_size_of_everything_do_not_count() -> None:
    x_C, w_C = torch.tensor([1.0, 4.0, 9.0, 0.0, 5.0]), torch.tensor([8.0, 2.0, 3.0, 5.0, 0.0])
    alone = smoothing_scale(x_C[:3], w_C[:3], 0.5)
    for size in (1.0, 1e-12, 1e12):
        torch.testing.assert_close(smoothing_scale(size * x_C, size * w_C, 0.5), torch.cat([alone, torch.ones(2)]), rtol=1e-4, atol=0)


def test_no_channels() -> None:
    assert smoothing_scale(torch.zeros(0), torch.zeros(0), 0.5).shape == (0,)


def test_settings() -> None:
    assert STEPS["smooth"] is Smooth
    assert Smooth().strength == "auto"
    for strength in (-0.1, 1.1):
        with pytest.raises(PlanishError, match=f"smooth.strength is {strength}"):
            Smooth(strength=strength)
