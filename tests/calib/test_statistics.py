"""Streaming statistics against the plain computation on everything at once."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.calib.statistics import STRIDE, ChannelStatistics
from planish.quant import pieces
from planish.quant.errors import PlanishError


def sample(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Heavy-tailed, off centre, of very different sizes by channel, with one massive token."""
    generator = torch.Generator().manual_seed(seed)
    x_TC = torch.randn(tokens, channels, generator=generator) ** 3 + 0.5
    x_TC *= torch.logspace(-3, 2, channels)
    if tokens:
        x_TC[0, -1] = 25_000
    return x_TC


def gathered(*pieces: Tensor, keep: list[Tensor] | None = None, name: str = "a site") -> ChannelStatistics:
    seen = ChannelStatistics(pieces[0].shape[1], name)
    for index, piece in enumerate(pieces):
        seen.update(piece, keep[index] if keep else None)
    return seen


def assert_like_numpy(seen: ChannelStatistics, x_TC: Tensor) -> None:
    x = x_TC.double().numpy()
    assert seen.tokens == len(x)
    np.testing.assert_array_equal(seen.minimum_C, x.min(0))
    np.testing.assert_array_equal(seen.maximum_C, x.max(0))
    np.testing.assert_array_equal(seen.absmax_C, abs(x).max(0))
    np.testing.assert_allclose(seen.mean_C, x.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(seen.second_C, (x**2).mean(0), rtol=1e-6)
    for q in (0.01, 0.5, 0.99, 1.0):
        true = np.quantile(abs(x).max(1), q, method="inverted_cdf")
        np.testing.assert_allclose(seen.token_maxima.quantile(q), [true], rtol=seen.token_maxima.relative_error)
        true_C = np.quantile(abs(x[::STRIDE]), q, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(seen.quantile_C(q), true_C, rtol=seen.channels.relative_error, atol=2**-24)


@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 300])
@pytest.mark.parametrize("channels", [1, 2, 33])
def test_like_numpy(tokens: int, channels: int) -> None:
    x_TC = sample(tokens, channels)
    assert_like_numpy(gathered(x_TC), x_TC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    x_TC = sample(100, 8).to(dtype)
    assert_like_numpy(gathered(x_TC), x_TC.float())


@given(cuts=st.lists(st.integers(0, 90), max_size=5), piece=st.integers(1, 400))
def test_batches_and_pieces_change_nothing(cuts: list[int], piece: int) -> None:
    x_TC = sample(90, 5)
    edges = [0, *sorted(cuts), 90]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "CACHED", piece)
        assert_like_numpy(gathered(*(x_TC[a:b] for a, b in pairwise(edges))), x_TC)


@given(bits=st.integers(0, 2**40 - 1), piece=st.integers(1, 200))
def test_tokens_left_out_leave_no_trace(bits: int, piece: int) -> None:
    x_TC = sample(40, 4)
    keep_T = torch.tensor([bool(bits >> i & 1) for i in range(40)])
    x_TC[~keep_T, 1] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "CACHED", piece)
        seen = gathered(x_TC[:13], x_TC[13:], keep=[keep_T[:13], keep_T[13:]])
    if keep_T.any():
        assert_like_numpy(seen, x_TC[keep_T])
    else:
        assert seen.tokens == 0


@given(cut=st.integers(0, 12), seed=st.integers(0, 3))
def test_merged_is_whole_in_either_order(cut: int, seed: int) -> None:
    x_TC = sample(12 * STRIDE, 6, seed)
    left, right = x_TC[: cut * STRIDE], x_TC[cut * STRIDE :]
    whole, one, other = gathered(x_TC), gathered(left), gathered(right)
    one.merge(gathered(right))
    other.merge(gathered(left))
    for merged in (one, other):
        assert merged.tokens == whole.tokens
        assert torch.equal(merged.minimum_C, whole.minimum_C)
        assert torch.equal(merged.maximum_C, whole.maximum_C)
        torch.testing.assert_close(merged.sum_C, whole.sum_C, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(merged.square_C, whole.square_C, rtol=1e-12, atol=1e-9)
        assert torch.equal(merged.channels.counts_RB, whole.channels.counts_RB)
        assert torch.equal(merged.token_maxima.counts_RB, whole.token_maxima.counts_RB)


def test_stride_visits_every_position_of_a_window() -> None:
    length, seen = 512, set[int]()
    for token in range(0, STRIDE * length, STRIDE):
        seen.add(token % length)
    assert seen == set(range(length))


def test_no_token_kept() -> None:
    seen = gathered(sample(5, 3), sample(0, 3), keep=[torch.zeros(5, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)], name="block 3, qkv")
    assert seen.tokens == 0
    for read in (lambda: seen.absmax_C, lambda: seen.mean_C, lambda: seen.second_C, lambda: seen.quantile_C(0.5)):
        with pytest.raises(PlanishError, match="not one token was kept"):
            read()
    seen.update(sample(4, 3))
    seen.merge(ChannelStatistics(3))
    assert_like_numpy(seen, sample(4, 3))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_values_that_are_not_finite_are_loud_and_leave_no_trace(bad: float) -> None:
    seen = gathered(sample(9, 3), name="block 3, qkv")
    x_TC = sample(9, 3)
    x_TC[4, 1] = bad
    with pytest.raises(PlanishError, match=r"The input of block 3, qkv is not finite in 1 of 3 channels \(first: 1\)"):
        seen.update(x_TC)
    assert_like_numpy(seen, sample(9, 3))


def test_sums_do_not_drift() -> None:
    """float32 sums of this would be off by more than 1e-3."""
    x_TC = torch.full((4096, 1), 0.1)
    seen = gathered(*[x_TC] * 50)
    assert seen.mean_C.item() == pytest.approx(float(x_TC[0, 0]), rel=1e-12)
