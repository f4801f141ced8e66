"""DuQuant's greedy rotation against the same with every matrix written out, one step and one block at a time."""

import pytest
import torch
from helpers_transforms import assert_layer_stays, dense_chain, normal, outliers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.transforms.duquant import By, duquant, greedy_rotation, spreading
from planish.quant.transforms.factors import Blocks, Permutation, on_input
from planish.quant.transforms.permute import zigzag


def swap(size: int, channel: int) -> Tensor:
    """The permutation matrix that swaps channels 0 and `channel`."""
    matrix = torch.eye(size, dtype=torch.float64)
    matrix[:, [0, channel]] = matrix[:, [channel, 0]]
    return matrix


def textbook(x_NB: Tensor, steps: int, seed: int, by: str) -> Tensor:
    """Algorithm 1 for one rotation: all prefixes are tried anew on the original input."""
    size, base = x_NB.shape[1], spreading(x_NB.shape[1], seed)
    prefixes, product = [torch.eye(size, dtype=torch.float64)], torch.eye(size, dtype=torch.float64)
    for _ in range(steps):
        now = x_NB @ product
        row, column = divmod(int(now.abs().argmax()), size)
        channel = column if by == "column" else row % size
        product = product @ swap(size, channel) @ base @ swap(size, channel)
        prefixes.append(product)
    if by == "column":
        return min(prefixes, key=lambda R: float((x_NB @ R).abs().max()))
    return min(prefixes, key=lambda R: float((x_NB @ R).max() - (x_NB @ R).min()))


@pytest.mark.parametrize("by", ["column", "row"])
@pytest.mark.parametrize(("rows", "size", "steps"), [(20, 8, 12), (5, 7, 9), (3, 2, 4), (1, 16, 5), (4, 1, 3), (6, 5, 0)])
def test_a_greedy_rotation_is_the_textbooks(by: By, rows: int, size: int, steps: int) -> None:
    x_KNB = torch.stack([outliers(rows, size, seed=10 * k) for k in range(3)])
    found_KBB = greedy_rotation(x_KNB, steps, seed=4, by=by)
    wanted_KBB = torch.stack([textbook(x_NB, steps, 4, by) for x_NB in x_KNB])
    torch.testing.assert_close(found_KBB, wanted_KBB, rtol=0, atol=1e-12)


@given(st.integers(1, 20), st.integers(0, 99))
def test_spreading(size: int, seed: int) -> None:
    R_BB = spreading(size, seed)
    torch.testing.assert_close(R_BB[0], torch.full((size,), size**-0.5, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(R_BB @ R_BB.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99), st.booleans(), st.sampled_from(["column", "row"]))
def test_the_chain_is_orthogonal_and_never_raises_the_peak(block: int, count: int, tokens: int, seed: int, shared: bool, by: By) -> None:
    channels = block * count
    x_TC = outliers(tokens, channels, seed)
    chain = duquant(x_TC, block, 6, seed, shared=shared, by=by)
    assert [type(factor) for factor in chain] == ([Blocks] if count == 1 else [Blocks, Permutation, Blocks])
    assert isinstance(chain[0], Blocks)
    assert chain[0].matrix_KBB.shape == (1 if shared else count, block, block)
    assert chain[0].matrix_KBB.dtype is torch.float32
    T_CC = dense_chain(chain, channels)
    torch.testing.assert_close(T_CC @ T_CC.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-6)
    if by == "column":
        assert float(on_input(chain, x_TC).abs().max()) <= float(x_TC.abs().max()) * (1 + 1e-6)
    assert_layer_stays(chain, channels, tolerance=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_the_whole_chain(shared: bool) -> None:
    """Rotation, zigzag by what the rotation left, rotation: from the parts."""
    x_TC = outliers(9, 12)
    first = Blocks(torch.stack([textbook(part, 5, 1, "column") for part in parts(x_TC, shared)]).float())
    once_TC = first.on_input(x_TC)
    index_C = zigzag(once_TC.abs().max(0).values, 3)
    second = Blocks(torch.stack([textbook(part, 5, 2, "column") for part in parts(once_TC[:, index_C], shared)]).float())
    found = duquant(x_TC, 4, 5, 1, shared=shared)
    torch.testing.assert_close(on_input(found, x_TC), on_input((first, Permutation(index_C), second), x_TC), rtol=0, atol=1e-9)


def parts(x_TC: Tensor, shared: bool) -> list[Tensor]:
    """In blocks of 4: the rows that each rotation sees."""
    blocks = [x_TC[:, k : k + 4] for k in range(0, x_TC.shape[1], 4)]
    return [torch.stack(blocks, dim=1).reshape(-1, 4)] if shared else blocks


def test_outliers_are_flattened() -> None:
    """Two massive channels in one block, one of a single token: no value of a third of the peak is left."""
    x_TC = normal(64, 64)
    x_TC[:, 3] += 300
    x_TC[5, 7] = -900
    peaks = {by: float(on_input(duquant(x_TC, 16, 64, 0, by=by), x_TC).abs().max()) for by in ("column", "row")}
    assert max(peaks.values()) < 300


def test_one_row_of_peaks_is_enough_and_the_same_seed_gives_the_same() -> None:
    x_TC = outliers(30, 12)
    once, again = (duquant(x_TC.abs().amax(0, keepdim=True), 4, 8, 3) for _ in range(2))
    assert all(torch.equal(a, b) for f, g in zip(once, again, strict=True) for a, b in zip(f.tensors().values(), g.tensors().values(), strict=True))
    other = duquant(x_TC.abs().amax(0, keepdim=True), 4, 8, 4)
    assert not torch.equal(once[0].tensors()["matrix"], other[0].tensors()["matrix"])


@pytest.mark.parametrize(("shape", "block"), [((3, 12), 5), ((3, 12), 0), ((3, 12), -4), ((0, 12), 4)])
def test_what_is_refused(shape: tuple[int, int], block: int) -> None:
    with pytest.raises(PlanishError, match=f"duquant in blocks of {block}"):
        duquant(torch.ones(shape), block, 4, 0)
