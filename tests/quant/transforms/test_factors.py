"""Every factor against its dense matrix in float64; chains; what a checkpoint holds of them."""

import json

import pytest
import torch
from helpers_transforms import assert_layer_stays, dense, dense_chain, normal
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from planish.quant.errors import PlanishError
from planish.quant.transforms.factors import (
    Blocks,
    Chain,
    Factor,
    Hadamard,
    Kronecker,
    Permutation,
    Reflection,
    Scale,
    Shift,
    on_input,
    on_weight,
    restore,
    rounded,
    store,
)
from planish.quant.transforms.hadamard import hadamard_block

KINDS = ("scale", "shift", "permutation", "hadamard", "signed", "blocks", "shared", "reflection", "kronecker")


def make(kind: str, left: int, right: int, seed: int, dtype: torch.dtype = torch.float64) -> Factor:
    """A factor for left * right channels: matrices are well-conditioned, not symmetric, not orthogonal."""
    channels = left * right

    def matrix(*shape: int) -> Tensor:
        return (torch.eye(shape[-1], dtype=torch.float64) + 0.5 * normal(*shape, seed=seed) / shape[-1] ** 0.5).to(dtype)

    match kind:
        case "scale":
            return Scale(normal(channels, seed=seed).exp().to(dtype))
        case "shift":
            return Shift(normal(channels, seed=seed).to(dtype))
        case "permutation":
            return Permutation(torch.randperm(channels, generator=torch.Generator().manual_seed(seed)))
        case "hadamard":
            return Hadamard(hadamard_block(channels))
        case "signed":
            return Hadamard(hadamard_block(right), normal(channels, seed=seed).sign().to(dtype))
        case "blocks":
            return Blocks(matrix(left, right, right))
        case "shared":
            return Blocks(matrix(1, right, right))
        case "reflection":  # of a basis that is off by a little, as a stored one is
            Q_CC = torch.linalg.qr(normal(channels, channels, seed=seed)).Q
            return Reflection((1.01 * 2**0.5 * Q_CC[:, : (channels + 1) // 2]).to(dtype).contiguous())
    return Kronecker(matrix(left, left), matrix(right, right))


sizes = st.integers(1, 7)
seeds = st.integers(0, 99)


@given(st.sampled_from(KINDS), sizes, sizes, seeds, st.sampled_from([(), (0,), (3,), (2, 3)]))
def test_a_factor_is_its_dense_matrix(kind: str, left: int, right: int, seed: int, leading: tuple[int, ...]) -> None:
    factor, x, w_OC = make(kind, left, right, seed), normal(*leading, left * right), normal(5, left * right, seed=1)
    T_CC = dense(factor, left * right)
    shift = factor.center_C if isinstance(factor, Shift) else 0
    torch.testing.assert_close(factor.on_input(x), (x - shift) @ T_CC, rtol=0, atol=1e-12)
    torch.testing.assert_close(factor.on_weight(w_OC), w_OC @ torch.linalg.inv(T_CC).T, rtol=1e-7, atol=1e-7)
    offset_O = factor.offset(w_OC)
    if isinstance(factor, Shift):
        assert offset_O is not None
        torch.testing.assert_close(offset_O, w_OC @ factor.center_C, rtol=0, atol=1e-12)
    else:
        assert offset_O is None


@given(st.lists(st.sampled_from(KINDS), max_size=5), sizes, sizes, seeds)
def test_a_layer_stays_the_same(kinds: list[str], left: int, right: int, seed: int) -> None:
    chain = tuple(make(kind, left, right, seed + i) for i, kind in enumerate(kinds))
    channels = left * right
    assert_layer_stays(chain, channels, tolerance=1e-6)
    zero_C = on_input(chain, torch.zeros(channels, dtype=torch.float64))
    torch.testing.assert_close(on_input(chain, normal(3, channels)) - zero_C, normal(3, channels) @ dense_chain(chain, channels), rtol=0, atol=1e-9)


def test_an_empty_chain_does_nothing() -> None:
    x_TC = normal(2, 3)
    assert on_input((), x_TC) is x_TC
    moved_OC, offset_O = on_weight((), x_TC)
    assert moved_OC is x_TC
    assert offset_O is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_result_is_as_x_and_computed_in_float32_or_wider(kind: str, dtype: torch.dtype) -> None:
    """Of 16 bits only the result is rounded, once."""
    factor, x_TC = make(kind, 3, 5, 0, torch.float32), normal(4, 15).to(dtype)
    before_TC = x_TC.clone()
    true_TC = (x_TC.double() - (factor.center_C.double() if isinstance(factor, Shift) else 0)) @ dense(factor, 15)
    true_weight_TC = x_TC.double() @ torch.linalg.inv(dense(factor, 15)).T
    for found_TC, wanted_TC in ((factor.on_input(x_TC), true_TC), (factor.on_weight(x_TC), true_weight_TC)):
        assert found_TC.dtype is dtype
        assert float((found_TC.double() - wanted_TC).norm() / wanted_TC.norm()) < (0.51 if dtype.itemsize == 2 else 4) * torch.finfo(dtype).eps
    assert torch.equal(x_TC, before_TC)


@given(st.lists(st.sampled_from(KINDS), max_size=12), sizes, sizes, seeds)
def test_store_and_restore(kinds: list[str], left: int, right: int, seed: int) -> None:
    """Through JSON and safetensors, as in a checkpoint."""
    chain = tuple(make(kind, left, right, seed + i, torch.float32) for i, kind in enumerate(kinds))
    described, tensors = store(chain)
    again = restore(json.loads(json.dumps(described)), load(save(tensors)))
    assert [type(factor) for factor in again] == [type(factor) for factor in chain]
    x_TC = normal(3, left * right)
    assert torch.equal(on_input(again, x_TC), on_input(chain, x_TC))
    assert torch.equal(on_weight(again, x_TC)[0], on_weight(chain, x_TC)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_chain_is_what_a_checkpoint_in_that_type_holds(kind: str) -> None:
    """In its own type, so that weights are made for what will run."""
    (found,), factor = rounded((make(kind, 3, 5, 0, torch.float32),), torch.bfloat16), make(kind, 3, 5, 0, torch.float32)
    for name, tensor in factor.tensors().items():
        assert found.tensors()[name].dtype is tensor.dtype
        assert torch.equal(found.tensors()[name], tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor)
    assert found.numbers() == factor.numbers()


def test_names_in_a_checkpoint() -> None:
    chain: Chain = (Scale(torch.ones(2)), Shift(torch.ones(2)), Permutation(torch.tensor([1, 0])), Hadamard(2), Hadamard(2, torch.ones(2)))
    chain += (Blocks(torch.eye(2)[None]), Kronecker(torch.eye(1), torch.eye(2)), Reflection(torch.ones(2, 1)))
    described, tensors = store(chain)
    assert [what["kind"] for what in described] == ["scale", "shift", "permutation", "hadamard", "hadamard", "blocks", "kronecker", "reflection"]
    assert described[3] == {"kind": "hadamard", "block": 2}
    assert sorted(tensors) == ["0.divisor", "1.center", "2.index", "4.signs", "5.matrix", "6.left", "6.right", "7.basis"]


@pytest.mark.parametrize(
    ("what", "tensors"),
    [
        ({"kind": "butterfly"}, {}),
        ({}, {}),
        ({"kind": "scale"}, {}),
        ({"kind": "scale"}, {"0.center": torch.ones(2)}),
        ({"kind": "scale"}, {"0.divisor": torch.ones(2), "0.more": torch.ones(2)}),
        ({"kind": "hadamard"}, {}),
        ({"kind": "hadamard", "block": "2"}, {}),
        ({"kind": "kronecker"}, {"0.left": torch.ones(2, 2)}),
    ],
    ids=str,
)
def test_what_is_unknown_is_refused(what: dict[str, object], tensors: dict[str, Tensor]) -> None:
    with pytest.raises(PlanishError, match="is unknown to this version of planish"):
        restore([what], tensors)
