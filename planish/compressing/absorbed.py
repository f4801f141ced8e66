"""A model's blocks in full precision as a recipe's steps leave them, one after the other: with everything that weights absorb, before any solver.

What a compression does up to its solvers: to measure what quantization costs at each site, or, done again, to hold a finished checkpoint against it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..calib.machine.precision import bfloat16_products
from ..calib.walk.stream import Stream
from ..planning.preflight import Plan
from ..walk.block import BlockCompressor, Turn
from ..walk.callbacks import Progress
from .compression import begun, streams_of


class AbsorbedBlocks:
    """The blocks of a plan's model. streams: of the calibration, None where the recipe has no text; `before` holds what enters the block."""

    def __init__(self, plan: Plan, progress: Progress, folder: Path | None = None, kept: Path | None = None) -> None:
        """folder: where the streams lie on disk, None: in memory. kept: where what is found before the walk is kept for the next."""
        self.plan, self.runner, steps = begun(plan, progress, kept)
        self.streams = streams_of(self.plan, self.runner, folder)
        if self.streams is not None:
            self.streams.before = Stream(None if folder is None else folder / "before")
        self.compressor = BlockCompressor(self.runner, self.plan.recipe.solver, steps, self.plan.packed, self.streams)

    @contextmanager
    def block(self, index: int, dtype: torch.dtype | None = None) -> Iterator[tuple[nn.Module, Turn]]:
        """Block `index`, in dtype (None: the runner's), in memory while the `with` lasts; and its turn, which has looked at it. In order from 0."""
        turn = Turn(self.compressor, index)
        with torch.no_grad():
            block = self.runner.load_block(index)
            try:
                if self.streams is not None:
                    with bfloat16_products(self.runner.dtype is torch.bfloat16):
                        turn.look(block, self.streams)
                for parameter in block.parameters():
                    parameter.data = parameter.data.to(dtype or self.runner.dtype)
                yield block, turn
            finally:
                self.runner.release_block(index)
