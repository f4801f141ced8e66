"""Looking at one block in full precision: one forward pass of every batch, and all that is to be known of its sites.

Shape suffixes: B samples, L tokens of a sample, D width, T = B * L tokens of a batch, C channels of a site.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .outliers import massive
from .runner import Call
from .statistics import ChannelStatistics
from .stream import Stream
from .sites import Site
from .walk import site_inputs


@dataclass(slots=True, eq=False)
class Observation:
    """What the full-precision pass showed.

    seen: statistics of each site without the sink tokens. sinks_C: the sink tokens' absolute maxima by site. keep_T: for each batch, which tokens are no sinks.
    """

    seen: dict[str, ChannelStatistics] = field(default_factory=dict)
    sinks_C: dict[str, Tensor] = field(default_factory=dict)
    keep_T: list[Tensor] = field(default_factory=list)

    @property
    def sink_tokens(self) -> int:
        """How many tokens were left out."""
        return sum(int((~keep).sum()) for keep in self.keep_T)


def sinks(before_BLD: Tensor, after_BLD: Tensor) -> Tensor:
    """Which tokens carry a massive activation into the block or out of it: (B * L,) bool."""
    return massive(before_BLD.flatten(0, 1)) | massive(after_BLD.flatten(0, 1))


@torch.no_grad()
def observe(block: nn.Module, index: int, sites: Sequence[Site], calls: Sequence[Call], stream: Stream, before: Stream | None = None) -> Observation:
    """Move `stream` past the block and look at its sites on the way. before: takes what entered the block, for a second pass."""
    observation = Observation()
    for i, call in enumerate(calls):
        hidden = stream[i]
        with site_inputs(block, sites) as inputs:
            out = call.run(block, index, hidden)
        keep_T = ~sinks(hidden, out)
        observation.keep_T.append(keep_T)
        for name, x_TC in inputs.items():
            observation.seen.setdefault(name, ChannelStatistics(x_TC.shape[1])).update(x_TC, keep_T)
            zero_C = torch.zeros(1, x_TC.shape[1], device=x_TC.device)
            largest_C = torch.cat([x_TC[~keep_T].float().abs(), zero_C]).amax(0)
            observation.sinks_C[name] = torch.maximum(observation.sinks_C.get(name, largest_C), largest_C)
        if before is not None:
            before[i] = hidden
        stream[i] = out
    return observation
