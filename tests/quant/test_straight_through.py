"""Rounding with the straight-through gradient: values those of the quantizers that run, gradients those of a quantizer written out by hand."""

from dataclasses import replace

import pytest
import torch
from helpers_transforms import normal, outliers
from torch import Tensor

from planish.quant.formats import ActivationFormat, WeightFormat
from planish.quant.linear import quantize_input
from planish.quant.solvers import Rtn
from planish.quant.straight_through import rounded_input, rounded_weight

INPUTS = (
    ActivationFormat(bits=4),
    ActivationFormat(bits=4, symmetric=False),
    ActivationFormat(bits=3, symmetric=False, granularity="group", group_size=4),
    ActivationFormat(bits=8, granularity="tensor"),
)
WEIGHTS = (WeightFormat(bits=4), WeightFormat(bits=4, symmetric=False, granularity="group", group_size=4), WeightFormat(bits=3, granularity="tensor"))


@pytest.mark.parametrize("fmt", INPUTS, ids=str)
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_inputs_are_what_the_layer_makes_of_them(fmt: ActivationFormat, clip: float) -> None:
    x_TC = torch.cat([outliers(9, 12).float(), torch.zeros(1, 12)])
    found = rounded_input(x_TC, fmt, torch.tensor(clip))
    assert torch.equal(found, quantize_input(x_TC, replace(fmt, clip=clip)).dequantize())


@pytest.mark.parametrize("fmt", WEIGHTS, ids=str)
def test_weights_are_what_rounding_to_nearest_makes_of_them(fmt: WeightFormat) -> None:
    w_OI = normal(7, 12).float()
    found = rounded_weight(w_OI, fmt, torch.tensor(1.0))
    torch.testing.assert_close(found, Rtn(clip=None).solve(w_OI, fmt, None, torch.float32).weight.dequantize(), rtol=1e-6, atol=0)


def by_hand(x: list[float], clip: float, bits: int, symmetric: bool) -> tuple[list[float], list[list[float]], list[float]]:
    """Values of one token, d value / d x (row: value), and d value / d clip; the zero point a constant, rounding the identity inside the grid."""
    low, high = min(0.0, min(x)) * clip, max(0.0, max(x)) * clip
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ends = [0.0] * len(x)  # d scale / d x
    if symmetric:
        scale, zero = max(-low, high) / qmax, 0
        ends[max(range(len(x)), key=lambda c: abs(x[c]))] = clip / qmax * (1 if high >= -low else -1)
    else:
        scale = (high - low) / (qmax - qmin)
        zero = round(qmin - low / scale)
        ends[x.index(max(x))] += clip / (qmax - qmin) * (max(x) > 0)
        ends[x.index(min(x))] -= clip / (qmax - qmin) * (min(x) < 0)
    values, slopes, clips = [], [], []
    for c, value in enumerate(x):
        steps = value / scale + zero
        inside = qmin <= round(steps) <= qmax
        code = min(max(round(steps), qmin), qmax)
        by_scale = code - zero - (value / scale if inside else 0)
        values.append((code - zero) * scale)
        slopes.append([by_scale * end + (inside and c == k) for k, end in enumerate(ends)])
        clips.append(by_scale * scale / clip)
    return values, slopes, clips


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_values_and_gradients_by_hand(symmetric: bool, clip: float, seed: int) -> None:
    x_TC, fmt = outliers(5, 6, seed), ActivationFormat(bits=4, symmetric=symmetric)
    ratio = torch.tensor(clip, dtype=torch.float64, requires_grad=True)
    for token in x_TC:
        x_1C = token[None].clone().requires_grad_()
        found = rounded_input(x_1C, fmt, ratio)[0]
        values, slopes, clips = by_hand(token.tolist(), clip, 4, symmetric)
        torch.testing.assert_close(found.detach(), _tensor(values), rtol=0, atol=1e-5 * float(token.abs().max()))
        for c in range(len(token)):
            by_x, by_clip = torch.autograd.grad(found[c], (x_1C, ratio), retain_graph=True)
            torch.testing.assert_close(by_x[0], _tensor(slopes[c]), rtol=0, atol=1e-4)
            assert float(by_clip) == pytest.approx(clips[c], rel=1e-4, abs=1e-4 * float(token.abs().max()))


def _tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
