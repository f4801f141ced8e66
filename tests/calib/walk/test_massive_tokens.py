"""Massive activations: the paper's criterion, on ordinary and on hostile input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.calib.walk import massive_tokens as outliers
from planish.calib.walk.massive_tokens import MassiveCriterion, massive
from planish.quant.errors import PlanishError


def textbook(h_TC: Tensor, criterion: MassiveCriterion) -> Tensor:
    size = h_TC.float().abs()
    return ((size > criterion.floor) & (size >= criterion.ratio * size.median())).any(1)


def hidden(tokens: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))


@given(
    peaks=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8), st.floats(-3000, 3000, width=32)), max_size=6),
    floor=st.floats(1, 500),
    ratio=st.floats(1, 2000),
)
def test_like_the_textbook(peaks: list[tuple[int, int, float]], floor: float, ratio: float) -> None:
    h_TC = hidden(31, 9)
    for token, channel, value in peaks:
        h_TC[token, channel] = value
    criterion = MassiveCriterion(floor=floor, ratio=ratio)
    assert torch.equal(massive(h_TC, criterion), textbook(h_TC, criterion))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [-25_000.0, 25_000.0])
def test_first_token(dtype: torch.dtype, value: float) -> None:
    h_TC = hidden(64, 16).to(dtype)
    h_TC[0, 7] = value
    assert massive(h_TC).nonzero().tolist() == [[0]]


@pytest.mark.parametrize(("size", "short", "enough"), [(1.0, 500.0, 800.0), (1e-3, 99.0, 101.0)], ids=["ratio", "floor"])
def test_one_condition_is_not_enough(size: float, short: float, enough: float) -> None:
    h_TC = hidden(64, 16) * size
    h_TC[3, 3] = short
    assert not massive(h_TC).any()
    h_TC[3, 3] = enough
    assert massive(h_TC).nonzero().tolist() == [[3]]


@pytest.mark.parametrize(("tokens", "channels"), [(0, 0), (0, 8), (8, 0)])
def test_nothing(tokens: int, channels: int) -> None:
    found = massive(torch.empty(tokens, channels))
    assert found.dtype == torch.bool
    assert found.tolist() == [False] * tokens


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_is_loud(bad: float) -> None:
    h_TC = hidden(8, 4)
    h_TC[6, 2] = bad
    with pytest.raises(PlanishError, match="token 6 is not finite"):
        massive(h_TC)


@pytest.mark.parametrize("limit", [1, 100, 1000])
def test_median_of_some_tokens_finds_the_same(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    h_TC = hidden(512, 64)
    h_TC[[0, 77], [3, 9]] = 2500.0
    monkeypatch.setattr(outliers, "_MEDIAN_VALUES", limit)
    assert massive(h_TC).nonzero()[:, 0].tolist() == [0, 77]


@pytest.mark.parametrize("settings", [{"floor": 0.0}, {"ratio": -1.0}, {"ratio": float("nan")}])
def test_impossible_criterion(settings: dict[str, float]) -> None:
    with pytest.raises(PlanishError, match="must be positive"):
        MassiveCriterion(**settings)
