"""The transforms of a block's sites learned together, by what they do to the block's output: FlatQuant's own objective (quant/transforms/flat.py).

What is made small is |B̂(x̂) - B(x)|² / |B(x)|² over the tokens that are no sinks: x̂ what enters the block from quantized predecessors, x what enters
it in the full-precision model; B̂ the block with the inputs and the weights of its transformed readers rounded.

Shape suffixes: T tokens of a batch, C = I channels, O out channels.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..calib.machine.precision import bfloat16_products, ordered_attention
from ..calib.walk.site_walk import replaced, site_inputs
from ..quant.descent import Adam
from ..quant.straight_through import rounded_input, rounded_weight
from ..quant.transforms import Flat
from ..quant.transforms.factors import Chain, on_input, on_weight
from ..quant.transforms.flat import LEAST_OPEN, WEIGHT_CLIP, Learned, start_clip
from ..quant.transforms.flat_shapes import Shape
from ..quant.transforms.inputs import InputStep, SiteView
from .flatten import SAMPLE_TOKENS, Known, Part
from .polishing import Flow, drawn
from .solving import Readers, held_batches

JUDGEMENTS = 4  # how often what is learned is held against the batches held out
HELD_OUT = 0.25  # of the batches
MOMENT_TOKENS = 4096  # tokens that a site's start is taken from, at most


@dataclass(slots=True, eq=False)
class _Soft:
    """A site as descent sees it: what its input goes through first and for good, the shape that is learned, and its clips as logits."""

    step: Flat
    readers: Readers
    before: Chain
    shape: Shape
    clip: float
    logits: list[Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor | None] = field(default_factory=dict)
    _chains: tuple[Chain, Chain] | None = None
    _last: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, step: Flat, readers: Readers, before: Sequence[InputStep], view: SiteView) -> "_Soft":
        """At its start."""
        first: Chain = ()
        for other in before:
            more = other.chain(view)
            first, view = (*first, *more), view.through(more)
        shape = step.shape(view)
        clip = start_clip(step, shape, view)
        logits = [torch.tensor(ratio).logit().requires_grad_() for ratio in (min(clip, LEAST_OPEN), WEIGHT_CLIP)]
        soft = cls(step, readers, first, shape, clip, logits)
        for path, w_OI in readers.weights.items():
            moved_OI, offset_O = on_weight((*first, *shape.front), w_OI)
            bias_O = readers.biases[path]
            offsets = [part.float() for part in (bias_O, offset_O) if part is not None]
            soft.weights[path], soft.biases[path] = moved_OI, sum(offsets[1:], offsets[0]) if offsets else None
        return soft

    @property
    def learns_clip(self) -> bool:
        act = self.readers.activations
        return self.step.clip and act is not None and act.dynamic

    def ratio(self) -> Tensor:
        """The clip of activations."""
        return self.logits[0].sigmoid() if self.learns_clip else torch.tensor(self.clip)

    def coded(self, x: Tensor) -> Tensor:
        """The site's input behind the chain, as codes stand for it: (T, C) float32, made once for all readers."""
        if self._last is None or self._last[0] is not x:
            y_TC = on_input(self.chains()[0], on_input((*self.before, *self.shape.front), x.reshape(-1, x.shape[-1]).float()))
            act = self.readers.activations
            self._last = x, y_TC if act is None else rounded_input(y_TC, act, self.ratio())
        return self._last[1]

    def weight(self, path: str) -> Tensor:
        """A reader's weight behind the chain with so much of its rounding as counts."""
        assert self.readers.packed is not None
        fmt, w_OI = self.readers.packed.scheme.weights, on_input(self.chains()[1], self.weights[path])
        if fmt is None or not self.step.balance:
            return w_OI
        return w_OI + math.sqrt(self.step.balance) * (rounded_weight(w_OI, fmt, self.logits[1].sigmoid()) - w_OI)

    def chains(self) -> tuple[Chain, Chain]:
        if self._chains is None:
            self._chains = self.shape.chains()
        return self._chains

    def forget(self) -> None:
        """Let go of the last input and of what follows from the numbers as they were."""
        self._chains = self._last = None

    def learned(self, before: float, after: float) -> Learned:
        return Learned(self.shape.chain(), float(self.ratio()) if self.learns_clip else None, before, after)


class _SoftLinear(nn.Module):
    """One reader."""

    def __init__(self, soft: _Soft, path: str) -> None:
        super().__init__()
        self.soft, self.path = soft, path

    def forward(self, x: Tensor) -> Tensor:
        y_TO = nn.functional.linear(self.soft.coded(x), self.soft.weight(self.path), self.soft.biases[self.path])
        return y_TO.to(x.dtype).reshape(*x.shape[:-1], y_TO.shape[1])


def learn_together(
    block: nn.Module, readers: Mapping[str, Readers], steps: Mapping[str, Sequence[InputStep]], flow: Flow, dtype: torch.dtype
) -> dict[str, Known]:
    """What the last step of each of these sites, a Flat, is to be; the float32 block stays as it is. steps: by site, up to that one.

    dtype: of the arithmetic outside of the readers.
    """
    copied = {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in block.parameters()}
    twin = copy.deepcopy(block, copied)
    views = _views(twin, {name: readers[name] for name in steps}, flow)
    sites: dict[str, _Soft] = {}
    for name, given in steps.items():
        last = given[-1]
        assert isinstance(last, Flat)
        sites[name] = _Soft.of(last, readers[name], given[:-1], views[name])
    held = held_batches(len(flow.calls), HELD_OUT)
    with replaced(twin, {path: _SoftLinear(soft, path) for soft in sites.values() for path in soft.weights}):
        found = _Descent(twin, sites, flow, len(flow.calls) - held).run()
    return {name: Known(learned) for name, learned in found.items()}


def _views(block: nn.Module, readers: Mapping[str, Readers], flow: Flow) -> dict[str, SiteView]:
    """What arrives at each site before anything of the block is quantized."""
    total = sum(int(keep.sum()) for keep in flow.keep_T)
    parts = {name: Part(found.width, -(-total // MOMENT_TOKENS), -(-total // SAMPLE_TOKENS)) for name, found in readers.items()}
    with site_inputs(block, [found.site for found in readers.values()]) as seen:
        for batch, call in enumerate(flow.calls):
            call.run(block, flow.index, flow.inputs[batch])
            for name, x_TC in seen.take().items():
                parts[name].add(x_TC[flow.keep_T[batch]])
    return {name: part.view(readers[name]) for name, part in parts.items()}


class _Descent:
    """All sites' numbers at once, a batch a step."""

    def __init__(self, block: nn.Module, sites: Mapping[str, _Soft], flow: Flow, learned: int) -> None:
        self.block, self.sites, self.flow, self.learned = block, sites, flow, learned
        self.step = next(iter(sites.values())).step

    def run(self) -> dict[str, Learned]:
        """The best met on the batches held out, never worse than the start."""
        groups = [group for soft in self.sites.values() for group in (*soft.shape.groups(soft.step.lr), (soft.logits, soft.step.lr))]
        optimizer = Adam(groups)
        before = best = self._judged()
        kept = self._as_it_stands(before, best)
        for i in range(self.step.steps):
            optimizer.step(self._slopes(drawn(i, self.learned, self.step.seed), optimizer.numbers), (1 + math.cos(math.pi * i / self.step.steps)) / 2)
            self._forget()
            if (i + 1) % max(1, self.step.steps // JUDGEMENTS) == 0 or i + 1 == self.step.steps:
                error = self._judged()
                if error < best:
                    best, kept = error, self._as_it_stands(before, error)
        return kept

    def _as_it_stands(self, before: float, after: float) -> dict[str, Learned]:
        return {name: soft.learned(before, after) for name, soft in self.sites.items()}

    def _slopes(self, batch: int, numbers: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.enable_grad(), bfloat16_products(True), ordered_attention(numbers[0].device):
            off, size = self.flow.squares(self.block, batch)
            return torch.autograd.grad(off / size, numbers, materialize_grads=True)

    @torch.no_grad()
    def _judged(self) -> float:
        """The relative error on the batches held out; infinite where it is none."""
        off = size = 0.0
        for batch in range(self.learned, len(self.flow.calls)):
            some_off, some_size = self.flow.squares(self.block, batch)
            off, size = off + float(some_off), size + float(some_size)
            self._forget()
        if not math.isfinite(off):
            return math.inf
        return math.sqrt(off / size) if size else 0.0

    def _forget(self) -> None:
        for soft in self.sites.values():
            soft.forget()
