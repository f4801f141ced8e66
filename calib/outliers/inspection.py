"""The walk that finds a model's outliers: every block once, one in memory at a time.

Through each block go the samples, whose sites are looked at; a short probe without the super weights found so far; and the held-out samples,
once unchanged and once for each change (interventions.py).

Shape suffixes: N samples, L positions, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..compressed.stored import StoredCheckpoint
from ..files.checkpoint import Checkpoint
from ..machine.heap import trim
from ..machine.precision import bfloat16_products
from ..walk.runner import BlockRunner, Call
from ..walk.site_walk import site_inputs
from ..walk.stream import Stream
from .diagnosis import Intervention, Landscape, OutlierReport, SiteFigures, SuperWeight, Thresholds
from .interventions import Forks
from .landscape import landscape
from .massive import Magnitudes
from .outlier_tokens import OutlierTokens
from .sink_heads import AttentionMeter, sink_heads
from .site_look import SiteLook
from .super_weights import PROBE, SuperWeightSearch, last_layers, published

BATCH_TOKENS = 1024  # tokens that run through a block at a time
ATTENTION_SAMPLES = 4  # samples in which the heads' attention is measured

Quality = Callable[[BlockRunner, Sequence[Tensor], Sequence[Stream]], list[float]]
"""quality(runner, batches, streams): the figure of each stream after the last block, the unchanged one first."""
Report = Callable[[str, int, int], None]
"""report(stage, done, total): so many steps of a stage are done."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Subject:
    """What goes through the model. samples, held_out: (N, L) ids or (N, 3, H, W) images. ids_NL: a number for each token of the samples; of images,
    its position. text: what such a number stands for. start: the id that begins a text, None if there is none. source: in words."""

    samples: Tensor
    held_out: Tensor
    ids_NL: Tensor
    text: Callable[[int], str]
    start: int | None
    source: str


def inspect_model(
    checkpoint: Checkpoint,
    subject: Subject,
    *,
    name: str,
    quality: Quality,
    unit: str,
    thresholds: Thresholds,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path | None = None,
    report: Report | None = None,
) -> OutlierReport:
    """Everything but findings, recommendation, seconds and peak_bytes, which stay empty.

    name: of the model, for the report. quality, unit: what tells the worth of a change, and its name. dtype, device: of the walk. folder: keeps the
    streams on disk there, None: in memory. Raises PlanishError for a model without a topology, and for values that are not finite.
    """
    tell = report or (lambda _stage, _done, _total: None)
    with torch.no_grad(), bfloat16_products(dtype is torch.bfloat16):
        walk = _Walk(BlockRunner(checkpoint, dtype, device), subject, thresholds, folder)
        count = walk.runner.topology.block_count
        for index in range(count):
            walk.block(index)
            tell("blocks", index + 1, count)
        walk.end(quality, lambda done, total: tell("quality", done, total))
    return walk.report(name, unit)


class _Walk:
    """The state between two blocks."""

    def __init__(self, runner: BlockRunner, subject: Subject, thresholds: Thresholds, folder: Path | None) -> None:
        self.runner, self.subject, self.thresholds, self.folder = runner, subject, thresholds, folder
        self.topology = runner.topology
        self.compressed = isinstance(runner.checkpoint, StoredCheckpoint)
        self.labels = [subject.text(token) for token in subject.ids_NL[0].tolist()]
        self.magnitudes = Magnitudes(thresholds, len(subject.samples), subject.ids_NL)
        self.outliers = OutlierTokens(subject.ids_NL, thresholds)
        self.meter = AttentionMeter()
        self.sites: list[SiteFigures] = []
        self.landscapes: list[Landscape] = []
        self.search = SuperWeightSearch(thresholds)
        self.super_weights: tuple[SuperWeight, ...] = ()
        self.interventions: list[Intervention] = []
        self._start()

    def _stream(self, name: str) -> Stream:
        return Stream(None if self.folder is None else self.folder / name)

    def _start(self) -> None:
        """Embeddings of everything."""
        per_batch = max(1, BATCH_TOKENS // self.subject.ids_NL.shape[1])
        main, self.held_out = (list(torch.split(part, per_batch)) for part in (self.subject.samples, self.subject.held_out))
        samples, length = PROBE
        probe = self.subject.samples[:samples] if self.topology.vision else self.subject.samples[:samples, :length]
        self.stream, held = self._stream("main"), self._stream("held-out")
        self.calls: list[Call] = []
        for i, (hidden, call) in enumerate(self.runner.start([*main, *self.held_out, probe])):
            if i < len(main):
                self.stream[i] = hidden
            elif i < len(main) + len(self.held_out):
                held[i - len(main)] = hidden
            else:
                self.probe = hidden
            self.calls.append(call)
        self.probe_call = self.calls.pop()
        held_calls = [self.calls.pop() for _ in self.held_out][::-1]
        self.forks = Forks(held_calls, held, self._stream, self.thresholds)
        self._after(-1)

    def _after(self, layer: int) -> None:
        """The hidden states that a layer gave out."""
        births = self.magnitudes.add(layer, self.stream)
        self.landscapes.append(landscape(layer, self.stream[0][0], self.labels))
        self.forks.change(layer, births, self.magnitudes.layers[-1].median)

    def block(self, index: int) -> None:
        """Everything through block `index`."""
        block = self.runner.load_block(index)
        layers = last_layers(block, self.topology, index)
        try:
            known = len(self.search.found)
            self.probe = self.search.step(layers, lambda hidden: self.probe_call.run(block, index, hidden), self.probe, layer=index)
            look = self._look(block, index)
            self.forks.advance(block, index, layers, self.search.found[known:])
            self.sites += [look.figures(site, None if self.compressed else block) for site in self.topology.block(index).sites]
        finally:
            self.runner.release_block(index)
            trim()
        self._after(index)

    def _look(self, block: nn.Module, index: int) -> SiteLook:
        """The samples through the block, its sites and heads watched."""
        sites = self.topology.block(index).sites
        look = SiteLook(index, sites, self.thresholds, self.outliers, first_is_sink=not self.topology.vision)
        done = 0
        for i, call in enumerate(self.calls):
            hidden = self.stream[i]
            with site_inputs(block, sites) as inputs:
                if done < ATTENTION_SAMPLES:
                    with self.meter.watching(index):
                        out = call.run(block, index, hidden)
                else:
                    out = call.run(block, index, hidden)
            look.update(hidden, out, inputs.take())
            self.stream[i] = out
            done += len(hidden)
        return look

    def end(self, quality: Quality, tell: Callable[[int, int], None]) -> None:
        """The worth of every change, and what is known of the model's super weights."""
        forks = self.forks.forks
        tell(0, 1)
        figures = quality(self.runner, self.held_out, [fork.stream for fork in forks])
        tell(1, 1)
        self.interventions = [Intervention(name=fork.name, layer=fork.layer, quality=figure) for fork, figure in zip(forks, figures, strict=True)]
        worth = {fork.weight: figure for fork, figure in zip(forks, figures, strict=True) if fork.weight is not None}
        known = published(self.runner.checkpoint.config)
        self.super_weights = tuple(
            replace(one, quality=worth.get(one), published=None if known is None else (one.layer, one.row, one.column) in known)
            for one in self.search.found
        )

    def report(self, name: str, unit: str) -> OutlierReport:
        """What was found."""
        attention = self.meter.result()
        samples, length = self.subject.ids_NL.shape
        return OutlierReport(
            model=name,
            family=self.topology.family,
            blocks=self.topology.block_count,
            hidden=self.probe.shape[-1],
            compressed=self.compressed,
            text=self.subject.source,
            samples=samples,
            length=length,
            thresholds=self.thresholds,
            quality=unit,
            magnitudes=tuple(self.magnitudes.layers),
            massive=self.magnitudes.activations(self.subject.text),
            interventions=tuple(self.interventions),
            super_weights=self.super_weights,
            sink_heads=() if attention is None else sink_heads(attention, self.thresholds),
            attention=attention,
            outlier_tokens=self.outliers.tokens(self.subject.text),
            prefix=self.outliers.prefix(self.subject.text, self.subject.start) if self.topology.takes_prefix else None,
            sites=tuple(self.sites),
            landscapes=tuple(self.landscapes),
            recommendation=None,
            findings=(),
            seconds=0.0,
            peak_bytes=0,
        )
