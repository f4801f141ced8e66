"""Interventions: what is changed, and that it then runs on its own."""

import torch
from torch import Tensor, nn

from planish.calib.outliers.diagnosis import SuperWeight, Thresholds
from planish.calib.outliers.interventions import AVERAGED, UNCHANGED, WEIGHTS_OF_LAYER, ZEROED, Fork, Forks
from planish.calib.outliers.massive import Birth
from planish.calib.walk.runner import Call
from planish.calib.walk.stream import Stream


class Block(nn.Module):
    """h + down(h)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(4, 4, bias=False)
        self.down.weight.data = torch.arange(16.0).view(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(hidden)


def begun(hidden: Tensor) -> Forks:
    base = Stream()
    base[0] = hidden
    return Forks([Call([((), {})] * 3)], base, lambda _name: Stream(), Thresholds())


def weight(row: int, column: int) -> SuperWeight:
    return SuperWeight(module="0.down", layer=0, row=row, column=column, value=1.0, activation=1.0, output=1.0)


def by_name(forks: Forks) -> dict[str, Fork]:
    return {fork.name: fork for fork in forks.forks}


def test_massive_values_are_zeroed_or_averaged() -> None:
    hidden = torch.ones(2, 3, 4)
    hidden[0, 0, 1], hidden[1, 0, 1], hidden[1, 2, 3], hidden[0, 1, 3] = 5000, 900, -3000, 90
    forks = begun(hidden.clone())
    forks.change(0, (Birth(1, 0, 3000.0), Birth(3, None, -3100.0)), median=1.0)
    found = by_name(forks)
    assert list(found) == [UNCHANGED, ZEROED, AVERAGED]
    assert torch.equal(found[UNCHANGED].stream[0], hidden)
    for name, first, other in ((ZEROED, 0.0, 0.0), (AVERAGED, 3000.0, -3100.0)):
        expected = hidden.clone()
        expected[:, 0, 1], expected[1, 2, 3] = first, other
        assert torch.equal(found[name].stream[0], expected)
        assert found[name].layer == 0


def test_forks_go_on_through_the_blocks() -> None:
    block, hidden = Block(), torch.randn(2, 3, 4)
    forks = begun(hidden)
    forks.change(-1, (Birth(1, 0, 7.0),), median=1.0)
    forks.advance(block, 0, {"0.down": block.down}, ())
    zeroed = hidden.clone()
    zeroed[:, 0, 1] = 0
    with torch.no_grad():
        assert torch.equal(by_name(forks)[ZEROED].stream[0], block(zeroed))
        assert torch.equal(by_name(forks)[UNCHANGED].stream[0], block(hidden))


def test_a_super_weight_is_left_out_in_its_own_fork_only() -> None:
    block, hidden = Block(), torch.randn(2, 3, 4)
    before = block.down.weight.detach().clone()
    forks = begun(hidden)
    forks.advance(block, 0, {"0.down": block.down}, [weight(2, 3), weight(0, 1), weight(1, 1)])
    assert torch.equal(block.down.weight, before)
    assert len(forks.forks) == 1 + WEIGHTS_OF_LAYER
    lost = before.clone()
    lost[2, 3] = 0
    with torch.no_grad():
        assert torch.equal(forks.forks[0].stream[0], block(hidden))
        torch.testing.assert_close(forks.forks[1].stream[0], hidden + hidden @ lost.T)
    assert forks.forks[1].weight == weight(2, 3)
