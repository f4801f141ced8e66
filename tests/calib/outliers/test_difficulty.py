"""The figures of a site against NumPy on everything at once."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.calib.outliers.diagnosis import Figures
from planish.calib.outliers.difficulty import Difficulty, binned
from planish.quant import pieces
from planish.quant.errors import PlanishError


def sample(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Heavy-tailed, off centre, of very different sizes by channel."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, channels, generator=generator) ** 3 + 0.5) * torch.logspace(-2, 1, channels)


def textbook(x_TC: Tensor) -> dict[str, float]:
    """diagnosis.Figures, word by word."""
    x = x_TC.double().numpy()
    size = np.linalg.norm(x, axis=0) / len(x) ** 0.5
    token = abs(x).max(1)
    return {
        "absmax": abs(x).max(),
        "kurtosis": (x**4).mean() / (x**2).mean() ** 2,
        "crest": abs(x).max() / (x**2).mean() ** 0.5,
        "difficulty": size.std(),
        "token_ratio": token.max() / np.quantile(token, 0.5, method="lower"),
    }


def assert_figures(found: Figures, x_TC: Tensor) -> None:
    for name, value in textbook(x_TC).items():
        assert getattr(found, name) == pytest.approx(value, rel=2e-6), name


def gathered(*pieces: Tensor, keep: list[Tensor] | None = None, name: str = "a site") -> Difficulty:
    seen = Difficulty(pieces[0].shape[1], name)
    for index, piece in enumerate(pieces):
        seen.update(piece, keep[index] if keep else None)
    return seen


@pytest.mark.parametrize("tokens", [1, 2, 7, 300])
@pytest.mark.parametrize("channels", [1, 2, 33])
def test_like_numpy(tokens: int, channels: int) -> None:
    x_TC = sample(tokens, channels)
    seen = gathered(x_TC)
    assert_figures(seen.ordinary, x_TC)
    assert seen.every == seen.ordinary
    assert seen.sink_tokens == 0
    np.testing.assert_array_equal(seen.ordinary_tokens.absmax_C, x_TC.abs().amax(0))
    np.testing.assert_array_equal(seen.ordinary_tokens.maxima_T, x_TC.abs().amax(1))
    np.testing.assert_allclose(seen.ordinary_tokens.square_C, x_TC.double().square().sum(0), rtol=1e-6)
    np.testing.assert_allclose(seen.ordinary_tokens.fourth_C, x_TC.double().pow(4).sum(0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    x_TC = sample(100, 8).to(dtype)
    before = x_TC.clone()
    assert_figures(gathered(x_TC).ordinary, x_TC.float())
    assert torch.equal(x_TC, before)


@given(cuts=st.lists(st.integers(0, 90), max_size=5), piece=st.integers(1, 400), bits=st.integers(1, 2**90 - 1), merge=st.integers(0, 5))
def test_batches_pieces_and_ranks_change_nothing(cuts: list[int], piece: int, bits: int, merge: int) -> None:
    x_TC = sample(90, 5)
    keep_T = torch.tensor([bool(bits >> i & 1) for i in range(90)])
    x_TC[~keep_T] *= 300
    edges = list(pairwise([0, *sorted(cuts), 90]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "CACHED", piece)
        seen, other = Difficulty(5), Difficulty(5)
        for index, (a, b) in enumerate(edges):
            (other if index >= merge else seen).update(x_TC[a:b], keep_T[a:b])
        seen.merge(other)
    assert_figures(seen.ordinary, x_TC[keep_T])
    assert_figures(seen.every, x_TC)
    assert seen.sink_tokens == int((~keep_T).sum())
    assert seen.channel_absmax() == tuple(x_TC[keep_T].abs().amax(0).tolist())


def test_a_gaussian_and_a_spike() -> None:
    x_TC = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    flat = gathered(x_TC).ordinary
    assert flat.kurtosis == pytest.approx(3, rel=0.02)
    assert flat.difficulty < 0.02
    assert flat.token_ratio < 2.5
    x_TC[7, 3] = 3000
    keep_T = torch.ones(4096, dtype=torch.bool)
    keep_T[7] = False
    seen = gathered(x_TC, keep=[keep_T])
    assert seen.ordinary.kurtosis == pytest.approx(3, rel=0.02)
    assert seen.every.kurtosis > 100_000
    assert seen.every.absmax == 3000
    assert seen.every.token_ratio > 1000
    assert seen.every.difficulty > 1


def test_tokens_that_are_zero_do_not_count_for_the_median() -> None:
    x_TC = torch.zeros(9, 3)
    assert gathered(x_TC).every == Figures(absmax=0.0, kurtosis=0.0, crest=0.0, difficulty=0.0, token_ratio=0.0)
    x_TC[0, 0], x_TC[1, 1], x_TC[2, 1] = 2, -3, -12
    assert gathered(x_TC).every.token_ratio == 4


def test_no_token() -> None:
    seen = gathered(sample(3, 2), sample(0, 2), keep=[torch.zeros(3, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)], name="3.qkv")
    assert_figures(seen.every, sample(3, 2))
    with pytest.raises(PlanishError, match=r"3\.qkv: not one token that is no sink"):
        _ = seen.ordinary
    with pytest.raises(PlanishError, match="not one token was seen"):
        _ = Difficulty(2).every


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e10])
@pytest.mark.parametrize("sink", [False, True])
def test_what_is_not_finite_is_an_error(bad: float, sink: bool) -> None:
    seen, x_TC, keep_T = gathered(sample(4, 3), name="3.qkv"), sample(5, 3), torch.ones(5, dtype=torch.bool)
    x_TC[2, 1] = bad
    keep_T[2] = not sink
    with pytest.raises(PlanishError, match=r"3\.qkv is not finite in 1 of 3 channels \(first: 1\)"):
        seen.update(x_TC, keep_T)
    assert_figures(seen.every, sample(4, 3))


@pytest.mark.parametrize(("channels", "bins", "count"), [(1, 256, 1), (256, 256, 256), (257, 256, 129), (576, 256, 192), (1536, 256, 256), (0, 4, 0)])
def test_bins_hold_the_largest_of_equally_many_channels(channels: int, bins: int, count: int) -> None:
    values_C = sample(1, channels)[0].abs()
    width = -(-channels // bins)
    found = binned(values_C, bins)
    assert len(found) == count <= bins
    assert found == tuple(values_C[start : start + width].max().item() for start in range(0, channels, max(1, width)))
