"""Looking at one block in full precision: one forward pass of every batch, and all that is to be known of its sites.

Shape suffixes: B samples, L tokens of a sample, D width, T = B * L tokens of a batch, C channels of a site.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..blocks.sites import Site
from ..machine.workers import Workers
from .massive_tokens import PAPER, massive
from .runner import Call
from .site_walk import site_inputs
from .statistics import Extremes
from .stream import Stream


@dataclass(slots=True, eq=False)
class Observation:
    """What the full-precision pass showed.

    seen: statistics of each site without the sink tokens. sinks_C: the sink tokens' absolute maxima by site. keep_T: for each batch,
    which tokens are no sinks. square_C: sums of the squares, of the sites where they were asked for.
    """

    seen: dict[str, Extremes] = field(default_factory=dict)
    sinks_C: dict[str, Tensor] = field(default_factory=dict)
    keep_T: list[Tensor] = field(default_factory=list)
    square_C: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sink_tokens(self) -> int:
        """How many tokens were left out."""
        return sum(int((~keep).sum()) for keep in self.keep_T)

    def add(self, batch: "_Look", index: int) -> None:
        """Take in one batch of block `index`."""
        self.keep_T.append(batch.keep_T)
        for name, found in batch.seen.items():
            self.seen.setdefault(name, Extremes(len(found.minimum_C), f"{index}.{name}")).widen(found.tokens, found.minimum_C, found.maximum_C)
            sinks_C = batch.sinks_C[name]
            self.sinks_C[name] = torch.maximum(self.sinks_C[name], sinks_C) if name in self.sinks_C else sinks_C
        for name, square_C in batch.square_C.items():
            self.square_C[name] = square_C + self.square_C.get(name, 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """One batch's part of an Observation."""

    keep_T: Tensor
    seen: dict[str, Extremes]
    sinks_C: dict[str, Tensor]
    square_C: dict[str, Tensor]

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], hidden: Tensor, out: Tensor, squares: Collection[str]) -> "_Look":
        """From what the sites, the block and the next block are given."""
        keep_T = ~sinks(hidden.flatten(0, 1), out.flatten(0, 1))
        seen = _ranges(inputs, keep_T)
        wide = [inputs[name] for name, found in seen.items() if not found.within(PAPER.floor)]  # only these can hold a massive activation
        if wide and bool((further_T := keep_T & sinks(*wide)).any()):
            keep_T = keep_T & ~further_T
            seen = _ranges(inputs, keep_T)
        left_out = not keep_T.all()
        sinks_C = {name: x_TC[~keep_T].float().abs().amax(0) if left_out else torch.zeros_like(x_TC[0]).float() for name, x_TC in inputs.items()}
        square_C = {name: inputs[name][keep_T].float().square().sum(0) for name in inputs if name in squares}
        return cls(keep_T, seen, sinks_C, square_C)


def _ranges(inputs: Mapping[str, Tensor], keep_T: Tensor) -> dict[str, Extremes]:
    """The ranges of the sites' inputs over the tokens kept."""
    seen = {name: Extremes(x_TC.shape[1]) for name, x_TC in inputs.items()}
    for name, x_TC in inputs.items():
        seen[name].update(x_TC, keep_T)
    return seen


def sinks(*views_TC: Tensor) -> Tensor:
    """Which tokens are sinks: those with a massive activation in any of the views of them. (T,) bool."""
    return torch.stack([massive(view_TC) for view_TC in views_TC]).any(0)


@torch.no_grad()
def observe(
    block: nn.Module,
    index: int,
    sites: Sequence[Site],
    calls: Sequence[Call],
    stream: Stream,
    before: Stream | None = None,
    workers: int = 1,
    *,
    original: Callable[[Tensor], Tensor] = lambda hidden: hidden,
    squares: Collection[str] = (),
) -> Observation:
    """Move `stream` past the block and look at its sites on the way.

    before: takes what entered the block, for a second pass. workers: how many share the batches; the result does not depend on it.
    original: the hidden states in the basis in which massive activations stand out. squares: sites whose sums of squares are wanted.
    """

    def look(batch: int) -> _Look:
        hidden = stream[batch]
        out = calls[batch].run(block, index, hidden)
        found = _Look.of(inputs.take(), original(hidden), original(out), squares)
        if before is not None:
            before[batch] = hidden
        stream[batch] = out
        return found

    observation = Observation()
    with site_inputs(block, sites) as inputs, Workers(workers) as crew:
        for found in crew.map(look, range(len(calls))):
            observation.add(found, index)
    return observation
