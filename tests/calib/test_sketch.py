"""The quantile sketch against sorting: within its bound, exact to merge, in any order."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.calib.sketch import QuantileSketch
from planish.quant.errors import PlanishError

LOW, HIGH = 2.0**-24, 2.0**24
magnitudes = st.floats(LOW, HIGH, width=32, exclude_max=True) | st.sampled_from([LOW, 0.5, 1.0, 1.125, 2 - 2.0**-23])


def sketch_of(x_TR: Tensor, bits: int = 3) -> QuantileSketch:
    sketch = QuantileSketch(x_TR.shape[1], bits)
    sketch.update(x_TR)
    return sketch


@given(
    values=st.lists(magnitudes, min_size=1, max_size=60),
    signs=st.integers(0, 2**60),
    q=st.floats(0, 1),
    bits=st.integers(0, 7),
)
def test_relative_error_is_within_the_bound(values: list[float], signs: int, q: float, bits: int) -> None:
    x = torch.tensor([value if signs >> i & 1 else -value for i, value in enumerate(values)], dtype=torch.float32)
    sketch = sketch_of(x[:, None], bits)
    true = x.abs().double().sort().values[max(1, math.ceil(q * len(values))) - 1].item()
    assert abs(sketch.quantile(q).item() - true) <= sketch.relative_error * true * (1 + 1e-12)


def test_bound_is_as_documented() -> None:
    assert QuantileSketch(1).relative_error == pytest.approx(0.0588, abs=1e-4)
    assert QuantileSketch(1, bits=5).relative_error == pytest.approx(0.0154, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_like_numpy_on_a_heavy_tail(dtype: torch.dtype) -> None:
    x_TR = torch.distributions.StudentT(torch.full((5,), 2.0)).sample((4000,)).to(dtype)
    sketch = sketch_of(x_TR)
    for q in (0.0, 0.25, 0.5, 0.9, 0.999, 1.0):
        true = np.quantile(x_TR.abs().double().numpy(), q, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(sketch.quantile(q).numpy(), true, rtol=sketch.relative_error + 1e-6, atol=LOW)


@given(cut=st.integers(0, 200), seed=st.integers(0, 5))
def test_merged_is_whole_in_any_order(cut: int, seed: int) -> None:
    x_TR = torch.randn(200, 3, generator=torch.Generator().manual_seed(seed)).exp()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed + 1))
    merged = sketch_of(x_TR[order][cut:])
    merged.merge(sketch_of(x_TR[order][:cut]))
    assert torch.equal(merged.counts_RB, sketch_of(x_TR).counts_RB)


def test_pooled_is_all_values_in_one_row() -> None:
    x_TR = torch.randn(50, 4)
    assert torch.equal(sketch_of(x_TR).pooled().counts_RB, sketch_of(x_TR.reshape(-1, 1)).counts_RB)


def test_ends_of_the_range() -> None:
    values = torch.tensor([0.0, -0.0, LOW / 2, torch.finfo(torch.float32).smallest_normal, HIGH, 3e38])[:, None]
    sketch = sketch_of(values)
    assert sketch.counts_RB[0, [0, -1]].tolist() == [4, 2]
    assert sketch.quantile(0.5).item() == 0
    assert sketch.quantile(1.0).item() == HIGH


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_of_nothing(rows: int) -> None:
    with pytest.raises(PlanishError, match="not one token was kept"):
        sketch_of(torch.empty(0, rows)).quantile(0.5)
