"""SoftLinear: at first what QuantizedLinear computes, and slopes that are those of the numbers themselves."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from planish.quant.formats import ActivationFormat, QuantizedWeight, WeightFormat
from planish.quant.linear import Kept, QuantizedLinear, Side, StaticGrid, quantize_input, without_first
from planish.quant.low_rank import LowRank
from planish.quant.soft import SoftInput, SoftLinear
from planish.quant.solvers import Rtn
from planish.quant.transforms.factors import Chain, Scale

T, I, O = 12, 32, 20  # noqa: E741
TOKEN = ActivationFormat(bits=4, symmetric=False, clip=0.9)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(fmt: WeightFormat, kept: int = 0) -> QuantizedWeight:
    """With 0 in the channels that are kept out of the codes."""
    return Rtn().solve(without_first(drawn(O, I, seed=1), kept), fmt, None, torch.float32).weight


def soft(
    fmt: WeightFormat, act: ActivationFormat | None, static: StaticGrid | None = None, chain: Chain = (), side: Side | None = None
) -> tuple[SoftLinear, QuantizedLinear]:
    """Both of one layer."""
    bias, kept = drawn(O, seed=2), 0 if side is None or side.kept is None else side.kept.channels
    codes = weight(fmt, kept)
    source = SoftInput(act, static, chain, kept, True)
    return SoftLinear(codes, bias, source, side), QuantizedLinear(codes, bias, act, static, chain, side=side)


@pytest.mark.parametrize(
    "fmt",
    [
        WeightFormat(bits=4, granularity="channel"),
        WeightFormat(bits=4, granularity="group", group_size=8),
        WeightFormat(bits=8, granularity="tensor"),
        WeightFormat(bits=4, granularity="channel", symmetric=False),
    ],
    ids=["channel", "group", "tensor", "asymmetric"],
)
@pytest.mark.parametrize(
    "act",
    [None, TOKEN, ActivationFormat(bits=8, granularity="tensor"), ActivationFormat(bits=4, granularity="group", group_size=16)],
    ids=["none", "token", "tensor", "group"],
)
def test_it_starts_as_the_layer_that_runs(fmt: WeightFormat, act: ActivationFormat | None) -> None:
    x = drawn(2, T // 2, I, seed=3)
    low = LowRank(drawn(3, I, seed=4), drawn(O, 3, seed=5))
    kept = Kept(drawn(O, 4, seed=6))
    for chain, side in (((), None), ((Scale(drawn(I, seed=7).exp()),), Side(low, kept))):
        one, other = soft(fmt, act, chain=chain, side=side)
        torch.testing.assert_close(one(x), other(x), atol=2e-5, rtol=1e-5)


def test_a_static_range_is_kept() -> None:
    x = drawn(T, I)
    act = ActivationFormat(bits=8, granularity="tensor", dynamic=False)
    one, other = soft(WeightFormat(bits=4, granularity="channel"), act, StaticGrid(torch.tensor([[0.02]]), None))
    assert one.source.clip is None
    torch.testing.assert_close(one(x), other(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_slopes_of_scales_are_those_of_the_layer_with_other_scales(groups: int) -> None:
    """By central differences, on the layer that runs: a scale times exp(h)."""
    fmt = WeightFormat(bits=4, granularity="channel") if groups == 1 else WeightFormat(bits=4, granularity="group", group_size=I // groups)
    x, pull = drawn(T, I), drawn(T, O, seed=9)
    one, _ = soft(fmt, TOKEN)
    (slope_OG,) = torch.autograd.grad((one(x) * pull).sum(), [one.log_OG])
    for o, g in ((0, 0), (7, groups - 1)):
        ends = []
        for h in (0.01, -0.01):
            codes = weight(fmt)
            scale_OG = codes.scale.clone()
            scale_OG[o, g] *= torch.tensor(h).exp()
            ends.append(float((QuantizedLinear(replace(codes, scale=scale_OG), drawn(O, seed=2), TOKEN)(x) * pull).sum().double()))
        assert (ends[0] - ends[1]) / 0.02 == pytest.approx(float(slope_OG[o, g]), rel=2e-2, abs=2e-2)


@pytest.mark.parametrize("act", [None, ActivationFormat(bits=8, granularity="tensor", dynamic=False)], ids=["none", "static"])
def test_slopes_of_the_input_are_those_of_all_that_it_is_multiplied_by(act: ActivationFormat | None) -> None:
    """Codes, low-rank path and kept channels; a static grid counts as the identity. Kept channels that are codes themselves pass nothing back."""
    x, pull, low, high_OR = drawn(T, I).requires_grad_(), drawn(T, O, seed=9), LowRank(drawn(3, I, seed=4), drawn(O, 3, seed=5)), drawn(O, 4, seed=6)
    fmt, static = WeightFormat(bits=4), None if act is None else StaticGrid(torch.tensor([[0.03]]), None)
    codes_OI = weight(fmt, 4).dequantize()
    whole_OI = codes_OI + low.product().float() + nn.functional.pad(high_OR, (0, I - 4))
    coded = Rtn().solve(high_OR, fmt, None, torch.float32).weight
    for side, wanted_OI in ((Side(low, Kept(high_OR)), whole_OI), (Side(None, Kept(coded, TOKEN)), codes_OI)):
        (slope,) = torch.autograd.grad((soft(fmt, act, static, side=side)[0](x) * pull).sum(), [x])
        torch.testing.assert_close(slope, pull @ wanted_OI, rtol=1e-4, atol=1e-4)


def test_readers_share_the_codes_of_one_input() -> None:
    source = SoftInput(TOKEN, None, (), 0, False)
    assert source.clip is None
    x = drawn(T, I)
    assert source(x)[1] is source(x)[1]
    torch.testing.assert_close(source(x)[1], quantize_input(x, TOKEN).dequantize())
    torch.testing.assert_close(source(2 * x)[1], quantize_input(2 * x, TOKEN).dequantize())
    source.forget()
    assert source._last is None
