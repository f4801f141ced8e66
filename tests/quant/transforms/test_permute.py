"""Zigzag against dealing cards by hand, and within heads against attention itself."""

import pytest
import torch
from helpers_transforms import assert_layer_stays, normal
from hypothesis import given
from hypothesis import strategies as st

from planish.quant.errors import PlanishError
from planish.quant.transforms.factors import Permutation
from planish.quant.transforms.permute import zigzag, zigzag_in_heads


def deal(magnitudes: list[float], blocks: int) -> list[int]:
    """One channel at a time, to hands."""
    hands: list[list[int]] = [[] for _ in range(blocks)]
    order = sorted(range(len(magnitudes)), key=lambda c: -magnitudes[c])
    for turn, channel in enumerate(order):
        lap, place = divmod(turn, blocks)
        hands[blocks - 1 - place if lap % 2 else place].append(channel)
    return [channel for hand in hands for channel in hand]


@given(st.integers(1, 6), st.integers(0, 6), st.data())
def test_dealing(blocks: int, size: int, data: st.DataObject) -> None:
    magnitudes = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5, 100.0]), min_size=blocks * size, max_size=blocks * size))
    index_C = zigzag(torch.tensor(magnitudes), blocks)
    assert index_C.dtype is torch.int64
    assert index_C.tolist() == deal(magnitudes, blocks)
    if size:
        assert_layer_stays((Permutation(index_C),), blocks * size)


def test_blocks_get_about_the_same() -> None:
    """Sums of sorted values differ by less than the largest value (two blocks take turns at the larger one)."""
    magnitude_C = normal(128, seed=2).exp()
    sums_K = magnitude_C[zigzag(magnitude_C, 8)].reshape(8, -1).sum(1)
    assert float(sums_K.max() - sums_K.min()) < float(magnitude_C.max())


def test_in_heads_attention_can_absorb_it() -> None:
    """4 query heads on 2 key-value heads of 6 channels: v's rows permuted once per key-value head are o's input permuted."""
    index_C = zigzag_in_heads(normal(24, seed=1).abs(), kv_heads=2, head_dim=6, blocks=3)
    v_TGD, weights_QTT = normal(5, 2, 6), normal(4, 5, 5, seed=2).softmax(-1)

    def mixed(values_TGD: torch.Tensor) -> torch.Tensor:
        return torch.einsum("qts,sqd->tqd", weights_QTT, values_TGD.repeat_interleave(2, dim=1)).reshape(5, 24)

    own_GD = torch.stack([index_C[0:6], index_C[12:18] - 12])
    moved_TGD = torch.stack([v_TGD[:, 0, own_GD[0]], v_TGD[:, 1, own_GD[1]]], dim=1)
    torch.testing.assert_close(mixed(moved_TGD), mixed(v_TGD)[:, index_C], rtol=0, atol=1e-12)
    assert_layer_stays((Permutation(index_C),), 24)


def test_in_heads_the_greatest_of_the_query_heads_counts() -> None:
    magnitude_C = torch.tensor([1.0, 2, 3, 4, 9, 1, 1, 1])
    assert zigzag_in_heads(magnitude_C, kv_heads=1, head_dim=4, blocks=2).tolist() == [0, 1, 3, 2, 4, 5, 7, 6]
    assert zigzag_in_heads(magnitude_C, kv_heads=2, head_dim=4, blocks=2).tolist() == [3, 0, 2, 1, 4, 7, 5, 6]


def test_sizes_that_do_not_fit() -> None:
    for blocks in (0, -2, 3):
        with pytest.raises(PlanishError, match=f"8 channels cannot be dealt to {blocks} blocks"):
            zigzag(torch.ones(8), blocks)
    with pytest.raises(PlanishError, match="24 channels are not made up of 2 key-value heads of 5"):
        zigzag_in_heads(torch.ones(24), kv_heads=2, head_dim=5, blocks=1)
