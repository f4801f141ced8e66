"""What outliers are worth: held-out text goes through the model once unchanged, and once more for every change, from the layer where it is made.

Sun et al. 2024, section 4: massive activations set to zero ruin a model; set to their mean over samples they change nothing. Yu et al. 2024,
section 3: nor does a model survive the loss of a super weight.

Shape suffixes: B samples of a batch, L positions, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..walk.runner import Call
from ..walk.stream import Stream
from .diagnosis import SuperWeight, Thresholds
from .massive import Birth
from .super_weights import without

UNCHANGED, ZEROED, AVERAGED = "unchanged", "massive activations set to zero", "massive activations set to their mean"
LAYERS = 3  # in which massive activations are born, at most, whose worth is measured
WEIGHTS = 8  # super weights, at most, whose worth is measured
WEIGHTS_OF_LAYER = 2  # of one layer, those with the largest spikes

MakeStream = Callable[[str], Stream]


@dataclass(frozen=True, slots=True, eq=False)
class Fork:
    """Hidden states with one change. layer: where it was made. weight: the super weight that was set to 0."""

    name: str
    layer: int | None
    stream: Stream
    weight: SuperWeight | None = None


class Forks:
    """The held-out hidden states before the block to come. forks: unchanged first. make: a new stream of that name."""

    def __init__(self, calls: Sequence[Call], base: Stream, make: MakeStream, thresholds: Thresholds) -> None:
        self.calls, self.make, self.thresholds = calls, make, thresholds
        self.forks = [Fork(UNCHANGED, None, base)]
        self._layers = self._weights = 0

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int, layers: Mapping[str, nn.Module], weights: Sequence[SuperWeight]) -> None:
        """Through the block; each of the first weights begins a fork without it. layers: the block's that they are in, by name."""
        before = self.forks[0].stream
        started: list[Fork] = []
        for weight in weights[:WEIGHTS_OF_LAYER]:
            if self._weights < WEIGHTS:
                self._weights += 1
                stream = self.make(f"weight-{self._weights}")
                with without(layers[weight.module], [(weight.row, weight.column)]):
                    self._through(block, index, before, stream)
                started.append(Fork(f"{weight.module}[{weight.row}, {weight.column}] set to zero", index, stream, weight))
        for fork in self.forks:
            self._through(block, index, fork.stream, fork.stream)
        self.forks += started

    def _through(self, block: nn.Module, index: int, source: Stream, target: Stream) -> None:
        for i, call in enumerate(self.calls):
            target[i] = call.run(block, index, source[i])

    @torch.no_grad()
    def change(self, layer: int, births: Sequence[Birth], median: float) -> None:
        """After the layer in which massive activations are born: one fork with them at zero, one with them at their mean. median: the layer's."""
        if not births or self._layers == LAYERS:
            return
        self._layers += 1
        for name, share in ((ZEROED, 0.0), (AVERAGED, 1.0)):
            stream = self.make(f"massive-{layer}-{share:.0f}")
            for i, hidden in enumerate(self.forks[0].stream):
                stream[i] = self._changed(hidden.clone(), births, median, share)
            self.forks.append(Fork(name, layer, stream))

    def _changed(self, hidden_BLD: Tensor, births: Sequence[Birth], median: float, share: float) -> Tensor:
        """At a position of its own every sample has it; elsewhere it is where the value is massive."""
        bar = max(self.thresholds.massive_floor, self.thresholds.massive_ratio * median)
        for birth in sorted(births, key=lambda one: one.position is not None):  # a position of its own has the last word
            if birth.position is not None:
                hidden_BLD[:, birth.position, birth.channel] = share * birth.value
            else:
                values_BL = hidden_BLD[:, :, birth.channel]
                values_BL[values_BL.abs() >= bar] = share * birth.value
        return hidden_BLD
