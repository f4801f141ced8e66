"""Looking at the sites of one block: how hard their inputs are, which tokens are outliers there, and a sub-sample to measure rounding on.

Shape suffixes: B samples of a batch, L positions, T = B * L tokens, C channels of a site.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..blocks.sites import Site, reader_weight
from ..walk.massive_tokens import MassiveCriterion, massive
from .diagnosis import SiteFigures, Thresholds
from .difficulty import Difficulty
from .outlier_tokens import OutlierTokens
from .rounding import output_errors

MEASURED_SAMPLES = 4  # samples from which the tokens come that rounding is measured on
MEASURED_TOKENS = 1024


class SiteLook:
    """What is seen at a block's sites while the batches go through it. first_is_sink: whether position 0 is no ordinary token anywhere."""

    def __init__(self, index: int, sites: Sequence[Site], thresholds: Thresholds, outliers: OutlierTokens, first_is_sink: bool) -> None:
        self.index, self.sites, self.outliers, self.first_is_sink = index, sites, outliers, first_is_sink
        self.criterion = MassiveCriterion(floor=thresholds.massive_floor, ratio=thresholds.massive_ratio)
        self.difficulty: dict[str, Difficulty] = {}
        self.sinks = self._done = 0
        self._x: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        self._keep: list[Tensor] = []

    @torch.no_grad()
    def update(self, hidden_BLD: Tensor, out_BLD: Tensor, inputs: Mapping[str, Tensor]) -> None:
        """Take in one batch: the block's input and output, and the inputs (T, C) of its sites."""
        samples, length = hidden_BLD.shape[:2]
        views = (hidden_BLD.flatten(0, 1), out_BLD.flatten(0, 1), *inputs.values())
        keep_T = ~torch.stack([massive(view, self.criterion) for view in views]).any(0)
        self.sinks += int((~keep_T).sum())
        if self.first_is_sink:
            keep_T[::length] = False
        for name, x_TC in inputs.items():
            where = f"{self.index}.{name}"
            if name not in self.difficulty:
                self.difficulty[name] = Difficulty(x_TC.shape[1], where)
            self.difficulty[name].update(x_TC, keep_T)
            self.outliers.update(where, x_TC.view(samples, length, -1), self._done)
        self._sample(inputs, keep_T, samples, length)
        self._done += samples

    def _sample(self, inputs: Mapping[str, Tensor], keep_T: Tensor, samples: int, length: int) -> None:
        """Evenly spaced tokens of the first samples, position 0 among them."""
        count = min(samples, MEASURED_SAMPLES - self._done)
        if count <= 0:
            return
        stride = -(-length * MEASURED_SAMPLES // MEASURED_TOKENS)
        taken = (torch.arange(count)[:, None] * length + torch.arange(0, length, stride)).flatten()
        self._keep.append(keep_T[taken])
        for name, x_TC in inputs.items():
            self._x[name].append(x_TC[taken])

    def figures(self, site: Site, block: nn.Module | None) -> SiteFigures:
        """What was seen at one site. block: with its weights, to measure the errors of rounding; None: they are not measured."""
        seen = self.difficulty[site.name]
        figures = SiteFigures(
            block=self.index,
            site=site.name,
            channels=len(seen.sinks.absmax_C),
            every=seen.every,
            ordinary=seen.ordinary,
            sink_tokens=self.sinks,
            hosted=site.host is not None,
            channel_absmax=seen.channel_absmax(),
        )
        if block is None:
            return figures
        weights = [reader_weight(block.get_submodule(path)) for path in site.readers]
        found = output_errors(torch.cat(self._x[site.name]), torch.cat(self._keep), weights, f"{self.index}.{site.name}")
        return replace(figures, errors=found.errors, errors_every=found.errors_every, channel_absmax_after=found.channel_absmax_after)
