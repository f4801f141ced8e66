"""What a site's solver is told and what is said of its work, against the textbook: moments, sums over strips, errors; layers as they are stored."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from planish.calib.blocks.sites import Site
from planish.calib.compressed.packing import Packed
from planish.calib.walk.site_walk import Pass, walking
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat
from planish.quant.linear import quantize_input
from planish.quant.low_rank import LowRank
from planish.quant.solvers import Moments, Rtn
from planish.quant.transforms.factors import Blocks, on_input
from planish.walk import solving
from planish.walk.solving import Readers, gather, held_batches, output_error, settle, solve

SITE = Site(name="in", readers=("a", "b"))
INT8 = ActivationFormat(bits=8)
CHANNELS = 12
STORED = torch.bfloat16


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Pair(nn.Module):
    """Two readers of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(CHANNELS, 5), nn.Linear(CHANNELS, 7, bias=False)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = drawn(*parameter.shape, seed=seed + 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


def readers_of(block: nn.Module, activations: ActivationFormat | None, weights: WeightFormat | None = None) -> Readers:
    packed = Packed(Scheme(weights=weights or WeightFormat(bits=4), activations=activations), "int-quantized")
    return Readers.of(block, SITE, packed, None, STORED)


def passes(block: nn.Module, inputs: list[Tensor]) -> list[Pass]:
    def start(x: Tensor) -> Callable[[], Tensor]:
        return lambda: block(x)

    return [Pass(start(x)) for x in inputs]


@torch.no_grad()
def gathered(activations: ActivationFormat | None, full: list[Tensor] | None = None, share: float = 0.0, replay: bool = False) -> Moments:
    block, twin = Pair(), Pair()
    readers = readers_of(block, activations)
    readers.chain = (Blocks(torch.linalg.qr(drawn(CHANNELS, CHANNELS, seed=7))[0][None]),)
    with walking(block, [SITE], passes(block, INPUTS), replay) as walk, walking(twin, [SITE], passes(twin, full or INPUTS), replay) as other:
        return gather(readers, walk, KEEP, None if full is None else other, share)


INPUTS = [drawn(2, 3 + i, CHANNELS, seed=i) * torch.logspace(-1, 1, CHANNELS) for i in range(5)]
KEEP = [torch.arange(2 * x.shape[1]) % 3 != 1 for x in INPUTS]
TURN = (Blocks(torch.linalg.qr(drawn(CHANNELS, CHANNELS, seed=7))[0][None]),)


def expected(activations: ActivationFormat | None, inputs: list[Tensor]) -> list[Tensor]:
    """What the readers get of each batch: (T, C)."""
    turned = [on_input(TURN, x.flatten(0, 1)) for x in inputs]
    return turned if activations is None else [quantize_input(x_TC, activations).dequantize() for x_TC in turned]


@pytest.mark.parametrize("strip", [5, 512])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("activations", [None, INT8, ActivationFormat(bits=4)])
def test_moments_are_of_what_the_readers_get(activations: ActivationFormat | None, replay: bool, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks count, and are told apart; the cross moment is of what full precision has more."""
    monkeypatch.setattr(solving, "STRIP", strip)
    full = [x + drawn(*x.shape, seed=3) / 10 for x in INPUTS]
    found = gathered(activations, full, replay=replay)
    x_TC, keep_T = torch.cat(expected(activations, INPUTS)).double(), torch.cat(KEEP)
    full_TC = torch.cat(expected(None, full)).double()
    torch.testing.assert_close(found.second_II.double(), x_TC.T @ x_TC, rtol=1e-4, atol=1e-4)
    assert found.cross_II is not None
    torch.testing.assert_close(found.cross_II.double(), (full_TC - x_TC).T @ x_TC, rtol=1e-4, atol=1e-3)
    assert found.tokens == len(x_TC)
    assert found.ordinary == pytest.approx(float(x_TC[keep_T].square().sum() / x_TC.square().sum()), rel=1e-5)
    assert found.held_out is None


def test_the_last_batches_are_held_out_of_the_moments() -> None:
    found = gathered(INT8, share=0.4)
    assert found.held_out is not None
    for moments, part in ((found, slice(0, 3)), (found.held_out, slice(3, 5))):
        x_TC = torch.cat(expected(INT8, INPUTS)[part])
        torch.testing.assert_close(moments.second_II, x_TC.T @ x_TC, rtol=1e-4, atol=1e-4)
        assert moments.tokens == len(x_TC)
        assert moments.cross_II is None
    assert [held_batches(batches, share) for batches, share in ((8, 0.0), (8, 0.25), (8, 0.01), (2, 0.9), (1, 0.5))] == [0, 2, 1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("weights", [WeightFormat(bits=4), WeightFormat(bits=4, granularity="tensor"), WeightFormat(bits=4, symmetric=False)])
def test_each_reader_gets_its_own_rows(weights: WeightFormat) -> None:
    """As if each had been rounded alone; its error is that of its outputs, paths beside the codes counted in the size."""
    readers = readers_of(Pair(), None, weights)
    low = LowRank(down_RC=drawn(2, CHANNELS, seed=21), up_OR=drawn(5, 2, seed=20))
    readers.put_beside("a", low, STORED)
    before = {path: w_OI.clone() for path, w_OI in readers.weights.items()}
    solve(readers, Rtn(), None, STORED)
    for path, w_OI in before.items():
        alone = Rtn().solve(w_OI, weights, None, STORED).weight
        assert torch.equal(readers.solved[path].codes, alone.codes)
        assert torch.equal(readers.solved[path].dequantize(), alone.dequantize())
    x_TC = drawn(40, CHANNELS, seed=22)
    off = sum(((readers.solved[path].dequantize() - w_OI) @ x_TC.T).square().sum() for path, w_OI in before.items())
    size = (Pair().a.weight @ x_TC.T).square().sum() + (Pair().b.weight @ x_TC.T).square().sum()
    found = output_error(readers, Moments(second_II=x_TC.T @ x_TC, tokens=40))
    assert found == pytest.approx(float(off / size) ** 0.5, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("activations", [None, INT8])
def test_readers_that_stay_whole_run_as_they_are_stored(activations: ActivationFormat | None) -> None:
    """Weights and biases rounded to what the checkpoint will hold, whatever the walk computes in."""
    block = Pair()
    readers = readers_of(block, activations)
    readers = replace(readers, packed=None, chain=TURN)
    with walking(block, [SITE], passes(block, INPUTS[:1]), False) as walk:
        list(walk.arrivals("in"))
        settle(readers, walk, torch.float32, STORED)
        (found,) = walk.outputs()
    plain = Pair()
    for parameter in plain.parameters():
        parameter.data = parameter.to(STORED).float()
    assert torch.equal(found, plain(on_input(TURN, INPUTS[0].flatten(0, 1)).view_as(INPUTS[0])))
