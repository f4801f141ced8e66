"""Looking at one block in full precision: one forward pass of every batch, and all that is to be known of its sites.

Shape suffixes: B samples, L tokens of a sample, D width, T = B * L tokens of a batch, C channels of a site.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .outliers import massive
from .runner import Call
from .sites import Site
from .statistics import Extremes
from .stream import Stream
from .walk import site_inputs


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
    *,
    original: Callable[[Tensor], Tensor] = lambda hidden: hidden,
    squares: Collection[str] = (),
) -> Observation:
    """Move `stream` past the block and look at its sites on the way.

    before: takes what entered the block, for a second pass. original: the hidden states in the basis in which massive activations stand out.
    squares: sites whose sums of squares are wanted.
    """
    observation = Observation()
    for i, call in enumerate(calls):
        hidden = stream[i]
        with site_inputs(block, sites) as inputs:
            out = call.run(block, index, hidden)
        keep_T = ~sinks(original(hidden).flatten(0, 1), original(out).flatten(0, 1), *inputs.values())
        observation.keep_T.append(keep_T)
        for name, x_TC in inputs.items():
            if name not in observation.seen:
                observation.seen[name] = Extremes(x_TC.shape[1], f"{index}.{name}")
                observation.sinks_C[name] = torch.zeros(x_TC.shape[1], device=x_TC.device)
            observation.seen[name].update(x_TC, keep_T)
            if not keep_T.all():
                observation.sinks_C[name] = torch.maximum(observation.sinks_C[name], x_TC[~keep_T].float().abs().amax(0))
            if name in squares:
                square_C = x_TC[keep_T].float().square().sum(0)
                observation.square_C[name] = square_C + observation.square_C.get(name, 0)
        if before is not None:
            before[i] = hidden
        stream[i] = out
    return observation
