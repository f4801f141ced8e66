"""What stands still on the way to a site changes no bit, in every family, and nothing that hangs on the site stands still."""

from pathlib import Path

import pytest
import torch
from helpers_compress import ids, source
from tiny_models import CONFIGS
from torch import nn

from planish.calib.blocks.experts import seeing_all
from planish.calib.blocks.sites import Site
from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.walk.recorded import Recorded, recording
from planish.calib.walk.runner import BlockRunner
from planish.calib.walk.site_walk import replaced


class Counted(nn.Module):
    """Three times what it is given; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (any shape) times 3."""
        self.calls += 1
        return 3 * x


class Chain(nn.Module):
    """before, then twice the same module, then the readers, with a module between them that reads one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.twice, self.other, self.between, self.reader, self.after = (Counted() for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: any shape."""
        h = self.twice(self.twice(self.before(x)) + 1)
        return self.after(self.between(self.other(h)) + self.reader(h))


def test_what_returned_before_the_readers_stands_still() -> None:
    block, site = Chain(), Site(name="in", readers=("reader", "other"))
    x = torch.ones(2)
    with recording(block, [site]) as still:
        expected = block(x)
    assert set(still["in"]) == {"before"}  # not what is called twice, not a reader, not what comes after one
    with replaced(block, still["in"]):
        assert torch.equal(block(x), expected)
        assert isinstance(block.before, Recorded)
    assert isinstance(block.before, Counted)
    assert block.before.calls == 1
    assert block.after.calls == 2
    block(x)
    assert set(still["in"]) == {"before"}  # nothing is noted after the `with`


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_families(family: str, tmp_path: Path) -> None:
    runner = BlockRunner(open_checkpoint(source(family, tmp_path / "model", torch.float32)), torch.float32, torch.device("cpu"))
    ((hidden, call),) = runner.start([ids()])
    block, sites = runner.load_block(0), runner.topology.block(0).sites
    with recording(block, sites) as still:
        expected = call.run(block, 0, hidden)  # also experts that the router would leave out
    for site in sites:
        assert not any(path == reader or reader.startswith(path + ".") for path in still[site.name] for reader in site.readers)
        with seeing_all(block), replaced(block, still[site.name]):
            assert torch.equal(call.run(block, 0, hidden), expected)
    assert all(still[site.name] for site in sites[1:])
