"""Ranges around sink tokens, and sinks that only a site shows."""

import pytest
import torch
from torch import Tensor, nn

from planish.calib.blocks.sites import Site
from planish.calib.walk.massive_tokens import massive
from planish.calib.walk.observe import observe
from planish.calib.walk.runner import Call
from planish.calib.walk.statistics import Extremes
from planish.calib.walk.stream import Stream

TOKENS, WIDTH = 96, 8


@pytest.mark.parametrize("left_out", [[], [0], [0, 1, 40, 95], list(range(0, 96, 5)), list(range(96))], ids=["none", "first", "few", "many", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranges_leave_tokens_out(left_out: list[int], dtype: torch.dtype) -> None:
    x_TC = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep_T = torch.ones(TOKENS, dtype=torch.bool)
    keep_T[left_out] = False
    x_TC[left_out] *= 1000
    found = Extremes(WIDTH)
    found.update(x_TC, keep_T)
    assert found.tokens == TOKENS - len(left_out)
    if found.tokens:
        kept_TC = x_TC[keep_T].float()
        assert torch.equal(found.minimum_C, kept_TC.amin(0))
        assert torch.equal(found.maximum_C, kept_TC.amax(0))
        assert found.within(float(kept_TC.abs().max()))
        assert not found.within(float(kept_TC.abs().max()) * 0.99)
    else:
        assert found.within(0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_range_lies_within_its_further_end(sign: int) -> None:
    found = Extremes(2)
    found.update(sign * torch.tensor([[1.0, 3.0], [2.0, 0.5]]))
    assert found.within(3.0)
    assert not found.within(2.9)


def test_a_range_that_is_no_number_lies_within_nothing() -> None:
    found = Extremes(2)
    found.update(torch.tensor([[1.0, torch.nan]]))
    assert not found.within(1e9)


class Inside(nn.Module):
    """Nothing massive comes in or goes out, but the reader of site "deep" is given `peaks` (T,) times its input."""

    def __init__(self, peaks: Tensor) -> None:
        super().__init__()
        self.peaks = peaks
        self.first, self.deep = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x: (1, T, D)."""
        return self.first(x) + self.deep(x * self.peaks[:, None]) / 1e6


@torch.no_grad()
def test_a_token_that_is_massive_at_one_site_is_a_sink_at_all() -> None:
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    peaks = torch.ones(TOKENS)
    peaks[[0, 7]] = 1e5
    block = Inside(peaks)
    stream, expected = Stream(), block(x)
    stream[0] = x
    sites = (Site(name="in", readers=("first",)), Site(name="deep", readers=("deep",)))
    seen = observe(block, 0, sites, [Call([((), {})])], stream)
    assert (~seen.keep_T[0]).nonzero().flatten().tolist() == [0, 7]
    assert not massive(x[0]).any()
    assert seen.seen["in"].tokens == TOKENS - 2
    assert torch.equal(seen.seen["deep"].maximum_C, x[0, seen.keep_T[0]].amax(0))
    assert torch.equal(seen.sinks_C["deep"], (x[0] * peaks[:, None])[[0, 7]].abs().amax(0))
    assert torch.equal(stream[0], expected)
