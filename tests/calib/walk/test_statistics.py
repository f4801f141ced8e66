"""Ranges of a site's input against the plain computation on everything at once."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.calib.walk.statistics import Extremes
from planish.quant.errors import PlanishError


def sample(tokens: int, channels: int) -> Tensor:
    """Heavy-tailed, off centre, of very different sizes by channel, with one massive token."""
    x_TC = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0)) ** 3 + 0.5
    x_TC *= torch.logspace(-3, 2, channels)
    if tokens:
        x_TC[0, -1] = 25_000
    return x_TC


def gathered(*batches: Tensor, keep: list[Tensor] | None = None) -> Extremes:
    seen = Extremes(batches[0].shape[1], "block 3, qkv")
    for index, batch in enumerate(batches):
        seen.update(batch, keep[index] if keep else None)
    return seen


def assert_whole(seen: Extremes, x_TC: Tensor) -> None:
    assert seen.tokens == len(x_TC)
    assert torch.equal(seen.minimum_C, x_TC.amin(0).float())
    assert torch.equal(seen.maximum_C, x_TC.amax(0).float())
    assert torch.equal(seen.absmax_C, x_TC.abs().amax(0).float())


@pytest.mark.parametrize("tokens", [1, 6, 63, 64, 65, 300])
@pytest.mark.parametrize("channels", [1, 2, 33])
def test_of_one_batch(tokens: int, channels: int) -> None:
    x_TC = sample(tokens, channels)
    assert_whole(gathered(x_TC), x_TC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    x_TC = sample(100, 8).to(dtype)
    assert_whole(gathered(x_TC), x_TC)


@given(cuts=st.lists(st.integers(0, 90), max_size=5))
def test_batches_change_nothing(cuts: list[int]) -> None:
    x_TC = sample(90, 5)
    assert_whole(gathered(*(x_TC[a:b] for a, b in pairwise([0, *sorted(cuts), 90]))), x_TC)


@given(bits=st.integers(0, 2**40 - 1))
def test_tokens_left_out_leave_no_trace(bits: int) -> None:
    x_TC = sample(40, 4)
    keep_T = torch.tensor([bool(bits >> i & 1) for i in range(40)])
    x_TC[~keep_T, 1] = torch.nan
    seen = gathered(x_TC[:13], x_TC[13:], keep=[keep_T[:13], keep_T[13:]])
    if keep_T.any():
        assert_whole(seen, x_TC[keep_T])
    else:
        assert seen.tokens == 0


def test_no_token_kept() -> None:
    seen = gathered(sample(5, 3), sample(0, 3), keep=[torch.zeros(5, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)])
    assert seen.within(0)
    with pytest.raises(PlanishError, match="Statistics of block 3, qkv: not one token was kept"):
        _ = seen.absmax_C


def test_within() -> None:
    seen = gathered(torch.tensor([[-2.0, 1.0], [0.0, 3.0]]))
    assert [seen.within(bound) for bound in (2.9, 3.0)] == [False, True]
    assert not gathered(torch.tensor([[torch.nan]])).within(torch.inf)
