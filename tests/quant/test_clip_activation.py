"""The clip of activations against the outputs of the layers themselves, computed token by token in Python's own numbers."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers_solvers import inputs, weights
from torch import Tensor

from planish.quant import pieces
from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat
from planish.quant.linear import QuantizedInput, quantize_input
from planish.quant.solvers.clip_activation import RATIOS, best_clip, clip_errors

FORMATS = [{}, {"symmetric": False}, {"granularity": "group", "group_size": 4}, {"symmetric": False, "granularity": "tensor"}]


def dequantized(values: Sequence[float], bits: int, symmetric: bool, clip: float) -> list[float]:
    """One range of values there and back."""
    low, high = clip * min(0.0, *values), clip * max(0.0, *values)
    smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        scale, zero = max(-low, high) / largest or 1.0, 0
    else:
        scale = (high - low) / (largest - smallest) or 1.0
        zero = max(smallest, min(largest, round(smallest - low / scale)))
    return [(max(smallest, min(largest, round(value / scale + zero))) - zero) * scale for value in values]


def slow_error(x_TC: Tensor, w_OC: Tensor, fmt: ActivationFormat) -> float:
    """|Q(x) W' - x W'|², every range quantized on its own."""
    size = x_TC.numel() if fmt.granularity == "tensor" else fmt.group_size or x_TC.shape[1]
    ranges = x_TC.reshape(-1, size).tolist()
    hat_TC = torch.tensor([dequantized(values, fmt.bits, fmt.symmetric, fmt.clip) for values in ranges]).double().reshape(x_TC.shape)
    return float(((hat_TC - x_TC.double()) @ w_OC.T).square().sum())


@pytest.mark.parametrize("fields", FORMATS, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_equals_the_outputs_of_the_layer(fields: dict[str, Any], bits: int) -> None:
    x_TC, w_OC = inputs(30, 12).float(), weights(9, 12)
    found = clip_errors(x_TC, w_OC.T @ w_OC, ActivationFormat(bits=bits, **fields), RATIOS[:6])
    slow = [slow_error(x_TC, w_OC, ActivationFormat(bits=bits, clip=ratio, **fields)) for ratio in RATIOS[:6]]
    assert found.tolist() == pytest.approx(slow, rel=1e-4)


def test_the_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TC, w_OC, fmt = inputs(30, 12).float(), weights(9, 12), ActivationFormat(bits=4)
    whole = clip_errors(x_TC, w_OC.T @ w_OC, fmt)
    monkeypatch.setattr(pieces, "CACHED", 84)
    torch.testing.assert_close(clip_errors(x_TC, w_OC.T @ w_OC, fmt), whole, rtol=1e-6, atol=0)


def test_a_ratio_below_1_wins_for_4_bits_of_a_gaussian_and_none_for_8_bits_of_a_spike() -> None:
    x_TC = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(64)
    found = best_clip(x_TC, eye, ActivationFormat(bits=3))
    assert found.clip < 0.9
    assert found == ActivationFormat(bits=3, clip=found.clip)
    x_TC[:, 7] = 60
    assert best_clip(x_TC, eye, ActivationFormat(bits=8)).clip == 1


def test_inputs_of_half_precision_are_judged_in_float32() -> None:
    x_TC, w_OC = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    half_TC, readers_CC, fmt = x_TC.bfloat16(), w_OC.T @ w_OC, ActivationFormat(bits=4)
    torch.testing.assert_close(clip_errors(half_TC, readers_CC, fmt), clip_errors(half_TC.float(), readers_CC, fmt), rtol=1e-6, atol=0)


def test_readers_decide() -> None:
    """A large channel that no reader looks at is clipped away; one that they all look at is not."""
    x_TC = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    x_TC[:, 7] = 6
    blind, only = torch.eye(32), torch.zeros(32, 32)
    blind[7, 7] = 0
    only[7, 7] = 1
    assert best_clip(x_TC, blind, ActivationFormat(bits=4)).clip == pytest.approx(0.7)
    assert best_clip(x_TC, only, ActivationFormat(bits=4)).clip == 1


def test_clipped_values_get_the_last_code() -> None:
    quantized = quantize_input(torch.tensor([[4.0, -2.0, 0.9, 0.0]]), ActivationFormat(bits=4, clip=0.5))
    assert isinstance(quantized, QuantizedInput)
    assert quantized.codes.tolist() == [[7, -7, 3, 0]]  # the scale is 2 / 7
    assert quantized.dequantize()[0, 0] == pytest.approx(2.0)


def test_zeros_keep_the_whole_range() -> None:
    assert best_clip(torch.zeros(3, 4), torch.eye(4), ActivationFormat(bits=4)).clip == 1


def test_refused() -> None:
    fmt = ActivationFormat(bits=4)
    with pytest.raises(PlanishError, match=r"\(4, 4\)"):
        best_clip(torch.zeros(3, 4), torch.eye(5), fmt)
    with pytest.raises(PlanishError, match="static"):
        best_clip(torch.ones(3, 4), torch.eye(4), ActivationFormat(bits=4, granularity="tensor", dynamic=False), (0.9,))
    with pytest.raises(PlanishError, match=r"clip is 1\.2"):
        best_clip(torch.ones(3, 4), torch.eye(4), fmt, (1.2,))
    with pytest.raises(PlanishError, match="NaN or Inf"):
        best_clip(torch.ones(3, 4), torch.full((4, 4), math.nan), fmt)
