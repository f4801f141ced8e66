"""Super weights held out: nothing is lost, before a rotation and behind it, and the rest quantizes as if they had never been there."""

import math
import statistics

import pytest
import torch
from helpers_solvers import inputs, weights

from planish.quant.errors import PlanishError
from planish.quant.formats import WeightFormat
from planish.quant.solvers import Rtn
from planish.quant.transforms.factors import Hadamard, on_weight
from planish.quant.transforms.super_weight import clipped, hold_out

PLACES = [(2, 5), (4, 5), (0, 11), (2, 5)]


def with_spikes(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    w_OC = weights(6, 12).to(dtype)
    for (row, column), value in zip(PLACES, (9.0, -7.0, 5.0, 9.0), strict=True):
        w_OC[row, column] = value
    return w_OC


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nothing_is_lost(dtype: torch.dtype) -> None:
    w_OC = with_spikes(dtype)
    before = w_OC.clone()
    rest_OC, path = hold_out(w_OC, PLACES)
    assert torch.equal(w_OC, before)
    assert rest_OC.dtype == dtype
    assert path.down_RC.shape == (2, 12)  # two columns, two ranks
    assert torch.equal(rest_OC.double() + path.product(), w_OC.double())
    assert [rest_OC[place].item() for place in PLACES] == [0, 0, 0, 0]
    assert int((path.product() != 0).sum()) == 3


def test_the_layer_stays_the_same_behind_a_rotation_and_the_rest_quantizes_better() -> None:
    w_OC, x_TC = with_spikes(), inputs(40, 12).float()
    chain = (Hadamard(12),)
    rest_OC, path = hold_out(w_OC, PLACES)
    through, offset = path.through(chain)
    assert offset is None
    rotated_OC, turned_TC = on_weight(chain, rest_OC)[0], chain[0].on_input(x_TC)
    torch.testing.assert_close(turned_TC @ rotated_OC.T + through.on_input(turned_TC), x_TC @ w_OC.T, rtol=1e-4, atol=1e-4)
    fmt = WeightFormat(bits=4)
    smeared_OC, kept_OC = (Rtn().solve(w, fmt, None, torch.float32).weight.dequantize() for w in (on_weight(chain, w_OC)[0], rotated_OC))
    kept = turned_TC @ kept_OC.T + through.on_input(turned_TC) - x_TC @ w_OC.T
    assert kept[:, [0, 2, 4]].norm() < 0.1 * (turned_TC @ smeared_OC.T - x_TC @ w_OC.T)[:, [0, 2, 4]].norm()


@pytest.mark.parametrize("z", [0.5, 1.0, 9.0])
def test_the_rest_is_clipped_by_its_own_statistics(z: float) -> None:
    w_OC = with_spikes()
    w_OC[3, 3] = 0.4
    rest_OC, _ = hold_out(w_OC, PLACES, z)
    held = {row * 12 + column for row, column in PLACES}
    counted = [value for i, value in enumerate(w_OC.flatten().tolist()) if i not in held]
    mean, std = statistics.fmean(counted), statistics.pstdev(counted)
    expected = [0.0 if i in held else min(max(value, mean - z * std), mean + z * std) for i, value in enumerate(w_OC.flatten().tolist())]
    assert rest_OC.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert (rest_OC[3, 3] < 0.4) == (z < 9)
    assert clipped(w_OC, 1e9) is not w_OC
    assert torch.equal(clipped(w_OC, 1e9), w_OC)


def test_refused() -> None:
    with pytest.raises(PlanishError, match="empty"):
        hold_out(weights(3, 4), [])
    for place in ((3, 0), (0, 4), (-1, 0)):
        with pytest.raises(PlanishError, match="There is no weight"):
            hold_out(weights(3, 4), [place])
    for z in (0.0, -1.0, math.nan):
        with pytest.raises(PlanishError, match="standard deviations"):
            hold_out(weights(3, 4), [(0, 0)], z)
