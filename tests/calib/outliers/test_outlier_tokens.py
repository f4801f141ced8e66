"""Outlier tokens and the prefix that they suggest."""

import pytest
import torch
from torch import Tensor

from planish.calib.outliers.diagnosis import Thresholds
from planish.calib.outliers.outlier_tokens import OutlierTokens

SAMPLES, LENGTH = 4, 12
BOS, DOT = 1, 2


def ids() -> Tensor:
    ids_NL = torch.arange(10, 10 + SAMPLES * LENGTH).view(SAMPLES, LENGTH)
    for sample, position in ((0, 4), (1, 7), (3, 2)):
        ids_NL[sample, position] = DOT
    return ids_NL


def inputs(ids_NL: Tensor, first: float = 1.0, dot: float = 1.0) -> Tensor:
    """Every token's maximum is 1 but for the first one's and the dot's."""
    x = torch.linspace(-1, 0.5, 6).expand(SAMPLES, LENGTH, 6).clone()
    x[:, 0] *= first
    x[ids_NL == DOT] *= dot
    return x


def looked(first: float = 1.0, dot: float = 1.0, batch: int = SAMPLES) -> OutlierTokens:
    ids_NL = ids()
    seen = OutlierTokens(ids_NL, Thresholds())
    for start in range(0, SAMPLES, batch):
        seen.update("0.qkv", inputs(ids_NL)[start : start + batch], start)
        seen.update("1.down", inputs(ids_NL, first, dot)[start : start + batch], start)
    return seen


@pytest.mark.parametrize("batch", [1, SAMPLES])
def test_outliers_are_counted(batch: int) -> None:
    seen = looked(first=500, dot=65, batch=batch)
    dot, *initial = seen.tokens(str)
    assert (dot.token_id, dot.text, dot.count, dot.initial, dot.inside, dot.present) == (DOT, "2", 3, 0, 3, 3)
    assert (dot.ratio, dot.site) == (65.0, "1.down")
    assert sorted(token.token_id for token in initial) == ids()[:, 0].tolist()
    assert {(token.count, token.initial, token.inside, token.ratio) for token in initial} == {(1, 1, 0, 500.0)}


def test_the_prefix_holds_what_is_frequent_and_the_start() -> None:
    prefix = looked(first=500, dot=65).prefix(lambda token: {BOS: "<s>", DOT: "."}[token], BOS)
    assert prefix is not None  # 7 outliers in 4 samples: 2 tokens
    assert (prefix.token_ids, prefix.text, prefix.length) == ((DOT, BOS), ".<s>", 2)


def test_the_first_token_alone_asks_for_the_start_alone() -> None:
    prefix = looked(first=500).prefix(str, BOS)
    assert prefix is not None
    assert (prefix.token_ids, prefix.length) == ((BOS,), 1)
    assert looked(first=500).prefix(str, None) is None


@pytest.mark.parametrize(("share", "ids_of_prefix"), [(0.5, (BOS,)), (0.3, (DOT, BOS))])
def test_a_token_that_is_an_outlier_now_and_then_is_left_out(share: float, ids_of_prefix: tuple[int, ...]) -> None:
    ids_NL = ids()
    seen = OutlierTokens(ids_NL, Thresholds(prefix_share=share))
    x = inputs(ids_NL, first=500)
    x[1, 7] *= 65  # one of three samples that hold the dot
    seen.update("1.down", x, 0)
    (dot,) = (token for token in seen.tokens(str) if token.token_id == DOT)
    assert (dot.inside, dot.present) == (1, 3)
    prefix = seen.prefix(str, BOS)
    assert prefix is not None
    assert (prefix.token_ids, prefix.length) == (ids_of_prefix, 2)


def test_without_a_start_token_the_frequent_ones_are_all() -> None:
    prefix = looked(first=500, dot=65).prefix(str, None)
    assert prefix is not None
    assert prefix.token_ids == (DOT,)


def test_nothing_beyond_the_bar_is_nothing() -> None:
    seen = looked(first=64, dot=3)
    assert seen.tokens(str) == ()
    assert seen.prefix(str, BOS) is None


def test_a_site_that_is_all_zero_has_no_outliers() -> None:
    seen = OutlierTokens(ids(), Thresholds())
    seen.update("0.down", torch.zeros(SAMPLES, LENGTH, 6), 0)
    assert seen.tokens(str) == ()
