"""Polishing a block: the weights' scales and the activations' clips are moved together, by what they do to the block's output.

What is made small is |B̂(x̂) - B(x)|² / |B(x)|² over the tokens that are no sinks: x̂ what enters the block from quantized predecessors, x what enters
it in the full-precision model.

Shape suffixes: T tokens of a batch, D width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..calib.compressed.packing import clipped
from ..calib.machine.precision import ordered_attention
from ..calib.walk.runner import Call
from ..calib.walk.site_walk import replaced
from ..calib.walk.stream import Stream
from ..quant.descent import Adam
from ..quant.soft import SoftInput, SoftLinear
from ..quant.transforms import Polish
from ..recipe.resolve import matches
from .solving import Readers, held_batches

JUDGEMENTS = 4  # how often what is learned is held against the batches held out
CLIP_RATE = 2.0  # a clip moves by so many times the rate of scales
CLIP_RANGE = (0.3, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """What enters a block and what should leave it, by batch; keep_T: the tokens that count."""

    index: int
    calls: Sequence[Call]
    inputs: Stream
    targets: Stream
    keep_T: Sequence[Tensor]

    def squares(self, block: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
        """Of the error and of what should leave the block, over the tokens that count."""
        out = self.calls[batch].run(block, self.index, self.inputs[batch]).flatten(0, 1).float()
        target, keep_T = self.targets[batch].flatten(0, 1).float(), self.keep_T[batch]
        return (out - target)[keep_T].square().sum(), target[keep_T].square().sum()


def drawn(i: int, batches: int, seed: int) -> int:
    """Which batch the i-th step of a descent learns from: all of them, in an order of their own each time that all have been used."""
    generator = torch.Generator().manual_seed(seed + i // batches)
    return int(torch.randperm(batches, generator=generator)[i % batches])


@dataclass(frozen=True, slots=True)
class Polished:
    """The block's relative error on the batches held out: before, and with what was kept. None of it was learned where they are equal."""

    before: float
    after: float


def polish(step: Polish, block: nn.Module, readers: Mapping[str, Readers], flow: Flow, stored: torch.dtype) -> Polished | None:
    """Move the scales and clips of the step's sites, in place. None where there is nothing to move, or only one batch to learn from.

    readers: of all the block's sites, for those that are not moved run as codes too.
    """
    moved = {name: matches(step.sites, flow.index, name) for name, site in readers.items() if site.solved}
    held = held_batches(len(flow.calls), step.held_out) if len(flow.calls) > 1 else 0
    if not (any(moved.values()) and held):
        return None
    sites = {name: _Soft(readers[name], step.clip and moved[name]) for name in moved}
    descent = _Descent(step, block, sites, [name for name in sites if moved[name]], flow, len(flow.calls) - held, stored)
    return descent.run()


class _Soft:
    """One site's readers as descent sees them."""

    def __init__(self, readers: Readers, learns_clip: bool) -> None:
        self.readers = readers
        self.source = SoftInput(readers.activations, readers.static, readers.chain, readers.kept_channels, learns_clip)
        self.linears = {path: SoftLinear(weight, readers.biases[path], self.source, readers.side(path)) for path, weight in readers.solved.items()}

    @property
    def scales(self) -> list[Tensor]:
        """What is learned of the weights."""
        return [linear.log_OG for linear in self.linears.values()]

    def round(self, stored: torch.dtype) -> None:
        """Let the scales be such as can be stored."""
        for path, linear in self.linears.items():
            scale_OG = self.readers.solved[path].scale
            linear.log_OG.copy_(((scale_OG * linear.log_OG.exp()).to(stored).float() / scale_OG).log())

    def adopt(self, stored: torch.dtype) -> None:
        """Give the readers what was learned."""
        for path, linear in self.linears.items():
            weight = self.readers.solved[path]
            self.readers.solved[path] = replace(weight, scale=(weight.scale * linear.log_OG.exp()).to(stored).float())
        if self.source.clip is not None and self.readers.packed is not None:
            self.readers.packed = clipped(self.readers.packed, float(self.source.clip))


class _Descent:
    """The search for the best scales and clips. moved: the names of the sites that have them."""

    def __init__(
        self, step: Polish, block: nn.Module, sites: Mapping[str, _Soft], moved: Sequence[str], flow: Flow, learned: int, stored: torch.dtype
    ) -> None:
        self.step, self.block, self.sites, self.flow, self.learned, self.stored = step, block, sites, flow, learned, stored
        self.moved = [sites[name] for name in moved]
        self.clips = [site.source.clip for site in self.moved if site.source.clip is not None]
        self.numbers = [scale for site in self.moved for scale in site.scales] + self.clips

    def run(self) -> Polished:
        """Descend; the best met is what the readers have afterwards."""
        step = self.step
        scales = self.numbers[: len(self.numbers) - len(self.clips)]
        optimizer = Adam([(scales, step.lr), (self.clips, CLIP_RATE * step.lr)])
        with replaced(self.block, {path: linear for site in self.sites.values() for path, linear in site.linears.items()}):
            before = best = self._judged()
            kept = [number.clone() for number in self.numbers]
            for i in range(step.steps):
                optimizer.step(self._slopes(drawn(i, self.learned, step.seed)), (1 + math.cos(math.pi * i / step.steps)) / 2)
                for clip in self.clips:
                    clip.clamp_(*CLIP_RANGE)
                if (i + 1) % max(1, step.steps // JUDGEMENTS) == 0 or i + 1 == step.steps:
                    error, found = self._candidate()
                    if error < best:
                        best, kept = error, found
        if best < before:
            for number, value in zip(self.numbers, kept, strict=True):
                number.copy_(value)
            for site in self.moved:
                site.adopt(self.stored)
        return Polished(before, best)

    def _slopes(self, batch: int) -> Sequence[Tensor]:
        with torch.enable_grad(), ordered_attention(self.numbers[0].device):
            off, size = self.flow.squares(self.block, batch)
            slopes = torch.autograd.grad(off / size, self.numbers)
        self._forget()
        return slopes

    @torch.no_grad()
    def _candidate(self) -> tuple[float, list[Tensor]]:
        """The error with what is learned by now, as it will be stored; descent goes on from what it had."""
        going = [number.clone() for number in self.numbers]
        for site in self.moved:
            site.round(self.stored)
        found = [number.clone() for number in self.numbers]
        error = self._judged()
        for number, value in zip(self.numbers, going, strict=True):
            number.copy_(value)
        return error, found

    @torch.no_grad()
    def _judged(self) -> float:
        """The relative error on the batches held out."""
        off = size = 0.0
        for batch in range(self.learned, len(self.flow.calls)):
            some_off, some_size = self.flow.squares(self.block, batch)
            off, size = off + float(some_off), size + float(some_size)
            self._forget()
        return math.sqrt(off / size) if size else 0.0

    def _forget(self) -> None:
        for site in self.sites.values():
            site.source.forget()
