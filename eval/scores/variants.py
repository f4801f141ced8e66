"""What a change at one place of a model does to its end: many streams in one pass, each block in memory once.

The plain stream runs through the model as it is. A variant begins at the block that is changed for it, with what enters that block in the plain
stream, so that it costs only the blocks from there on.

Shapes: ids (B, L) batches of token numbers; hidden (B, L, D).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ...calib.machine.workers import Workers, workers_for
from ...calib.walk.runner import BlockRunner, Call
from ...calib.walk.site_walk import replaced

Key: TypeAlias = tuple[int, str, str]
"""Block, site, and what is other there."""


@dataclass(slots=True, eq=False)
class Variants:
    """The plain stream and those that differ from it, each a list of hidden states by batch. Advance them block by block, from the first on."""

    calls: Sequence[Call]
    plain: list[Tensor]
    device: torch.device
    streams: dict[Key, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def start(cls, runner: BlockRunner, batches: Sequence[Tensor]) -> "Variants":
        """What enters the first block."""
        started = list(runner.start(list(batches)))
        return cls([call for _, call in started], [hidden for hidden, _ in started], runner.device)

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int, changes: Mapping[Key, Mapping[str, nn.Module]]) -> None:
        """All streams through block `index`, and a new one for each of changes: the block with these modules at these paths."""
        new: dict[Key, list[Tensor]] = {}
        for key, modules in changes.items():
            with replaced(block, modules):
                new[key] = self._run(block, index, [self.plain])[0]
        self.plain, *rest = self._run(block, index, [self.plain, *self.streams.values()])
        self.streams = dict(zip(self.streams, rest, strict=True)) | new

    def _run(self, block: nn.Module, index: int, streams: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        batches = range(len(self.calls))
        jobs: list[Callable[[], Tensor]] = [self._job(block, index, batch, stream[batch]) for stream in streams for batch in batches]
        with Workers(workers_for(len(jobs), self.device)) as workers:
            done = list(workers.map(lambda job: job(), jobs))
        return [done[start : start + len(batches)] for start in range(0, len(done), len(batches))]

    def _job(self, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Callable[[], Tensor]:
        return lambda: self.calls[batch].run(block, index, hidden)
