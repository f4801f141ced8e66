"""The small picture of one layer: every massive channel is in it."""

import pytest
import torch

from planish.calib.outliers.landscape import BINS, POSITIONS, landscape


@pytest.mark.parametrize(("length", "width"), [(3, 5), (64, 128), (100, 129), (70, 577)])
def test_bins_hold_the_largest(length: int, width: int) -> None:
    hidden = torch.randn(length, width, generator=torch.Generator().manual_seed(0))
    hidden[2, width - 2] = -12345.678
    found = landscape(4, hidden, [str(i) for i in range(length)])
    rows = min(length, POSITIONS)
    assert (found.layer, found.width, found.positions) == (4, width, tuple(range(rows)))
    assert found.tokens == tuple(str(i) for i in range(rows))
    assert len(found.channels) <= BINS
    assert max(found.values[2]) == 12350.0
    ends = (*found.channels[1:], width)
    for row, values in enumerate(found.values):
        expected = [hidden[row, start:end].abs().max().item() for start, end in zip(found.channels, ends, strict=True)]
        assert values == pytest.approx(expected, rel=1e-3)
