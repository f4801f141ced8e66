"""The steps that transform a site's input at run time: what a recipe says, and the chain that follows from what is known of the site.

Shape suffixes: T tokens, C channels, O out channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..errors import PlanishError
from ..formats import Scheme
from ..seeds import check_seed
from . import cat, duquant, shift, wush
from .factors import Chain, Shift, on_input, on_weight
from .factors import Hadamard as HadamardFactor
from .hadamard import hadamard_block
from .rotation import random_signs


@dataclass(frozen=True, eq=False)
class SiteView:
    """A site's input and its readers, as they are before the next transform; all without sink tokens, float32.

    sample_TC: some tokens. second_CC: mean of x' x over all; mean_C: of x. weights: of each reader, (O, C).
    scheme: how both will be quantized, if known.
    """

    sample_TC: Tensor
    second_CC: Tensor
    mean_C: Tensor
    weights: tuple[Tensor, ...]
    scheme: Scheme | None = None

    @cached_property
    def readers_CC(self) -> Tensor:
        """W' W, summed over the readers."""
        total_CC = torch.zeros_like(self.second_CC)
        for w_OC in self.weights:
            total_CC.addmm_(w_OC.T, w_OC)
        return total_CC

    def through(self, chain: Chain) -> "SiteView":
        """The view behind the chain."""
        second_CC, mean_C = self.second_CC, self.mean_C
        for factor in chain:
            if isinstance(factor, Shift):
                center_C = factor.center_C.to(mean_C)
                mixed_CC = torch.outer(mean_C, center_C)
                second_CC, mean_C = second_CC - mixed_CC - mixed_CC.T + torch.outer(center_C, center_C), mean_C - center_C
            else:
                second_CC, mean_C = factor.on_input(factor.on_input(second_CC).T.contiguous()), factor.on_input(mean_C[None])[0]
        weights = tuple(on_weight(chain, w_OC)[0] for w_OC in self.weights)
        return SiteView(on_input(chain, self.sample_TC), second_CC, mean_C, weights, self.scheme)


class InputStep(Protocol):
    """A step that transforms the input of the sites it matches."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Patterns of block.site."""
        ...

    def chain(self, view: SiteView) -> Chain:
        """What the input goes through."""
        ...


def divisor(width: int, block: int) -> int:
    """The largest divisor of the width that is at most `block`."""
    return next(size for size in range(min(block, width), 0, -1) if width % size == 0)


def check_block(name: str, block: int) -> None:
    """PlanishError for a block of no channels; name: the step."""
    if block < 1:
        raise PlanishError(f"{name}.block is {block}, but a block has at least 1 channel. Usual: 128.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cat:
    """CAT (cat.py): input and readers get the same second moments, block by block, then a Hadamard over all channels.

    block: channels of a block at most; the largest divisor of the width is taken. damping: as cat.cat_blocks.
    """

    block: int = 128
    damping: float = 0.02
    hadamard: bool = True
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        check_block("cat", self.block)
        if not 0 < self.damping <= 1:
            raise PlanishError(f"cat.damping is {self.damping}, but it is a part of the mean diagonal, above 0 and at most 1. Usual: 0.02.")

    def chain(self, view: SiteView) -> Chain:
        """The blocks, and the Hadamard if wanted."""
        return cat.cat(view.second_CC, view.readers_CC, divisor(len(view.second_CC), self.block), self.damping, hadamard=self.hadamard)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wush:
    """WUSH (wush.py): CAT in the common eigenbasis of a block, which a Hadamard makes flat. inner: whether that is inside the block or over all
    channels. block, damping: as Cat."""

    block: int = 128
    damping: float = 0.02
    inner: bool = False
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        check_block("wush", self.block)
        if not 0 < self.damping <= 1:
            raise PlanishError(f"wush.damping is {self.damping}, but it is a part of the mean diagonal, above 0 and at most 1. Usual: 0.02.")

    def chain(self, view: SiteView) -> Chain:
        """The blocks, and a Hadamard over all channels unless inner."""
        width = len(view.second_CC)
        blocks = wush.wush_blocks(view.second_CC, view.readers_CC, divisor(width, self.block), self.damping, hadamard=self.inner)
        size = hadamard_block(width)
        return (blocks,) if self.inner or size == 1 else (blocks, HadamardFactor(size))


@dataclass(frozen=True, kw_only=True, slots=True)
class Hadamard:
    """An online Hadamard over all channels (QuaRot's R4, at any site), or in blocks. block: channels of a block; null: as many as can be.

    seeds: so many draws of random signs are tried, and the one whose tokens have the least range is kept; 0: no signs.
    """

    block: int | None = None
    seeds: int = 0
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if self.block is not None:
            check_block("hadamard", self.block)
        if self.seeds < 0:
            raise PlanishError(f"hadamard.seeds is {self.seeds}, but it counts draws of random signs: 0 for none, 8 for a choice.")

    def chain(self, view: SiteView) -> Chain:
        """One factor."""
        width = len(view.second_CC)
        size = hadamard_block(width if self.block is None else divisor(width, self.block))
        tokens_TC = view.sample_TC
        drawn = [HadamardFactor(size, random_signs(width, seed).to(tokens_TC.device)) for seed in range(self.seeds)]
        return (min(drawn or [HadamardFactor(size)], key=lambda factor: _range(factor.on_input(tokens_TC))),)


def _range(x_TC: Tensor) -> float:
    """The mean square of the tokens' ranges: what the noise of a per-token grid is in proportion to."""
    return float((x_TC.amax(1) - x_TC.amin(1)).square().mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class Center:
    """A shift of every channel (shift.py): by its mean, or by the middle of its range (OutlierTune's symmetrisation)."""

    by: Literal["mean", "middle"] = "mean"
    sites: tuple[str, ...] = ("*",)

    def chain(self, view: SiteView) -> Chain:
        """One factor."""
        if self.by == "mean":
            return (Shift(view.mean_C),)
        return (shift.midrange(view.sample_TC.amin(0), view.sample_TC.amax(0)),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Duquant:
    """DuQuant (duquant.py): greedy rotation of blocks, zigzag permutation, rotation. steps: of a greedy search. seed: of the first."""

    block: int = 128
    steps: int = 256
    seed: int = 0
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        check_block("duquant", self.block)
        check_seed("duquant.seed", self.seed)
        if self.steps < 0:
            raise PlanishError(f"duquant.steps is {self.steps}, but it counts steps of a search: 0 for none. Usual: 256.")

    def chain(self, view: SiteView) -> Chain:
        """Three factors."""
        return duquant.duquant(view.sample_TC, divisor(len(view.second_CC), self.block), self.steps, self.seed)


def chain_of(steps: Sequence[InputStep], view: SiteView) -> Chain:
    """What the steps make of a site, one after the other, each of the view behind those before it."""
    chain: Chain = ()
    for i, step in enumerate(steps):
        more = step.chain(view)
        chain = (*chain, *more)
        if i + 1 < len(steps):
            view = view.through(more)
    return chain


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSearch:
    """At each matching site the clip of dynamic activations with which the readers' outputs lose least (clip_activation.py), 1 to `least`."""

    least: float = 0.7
    step: float = 0.025
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise PlanishError(f"clip.least is {self.least}, but it is a part of the range, above 0 and at most 1. Usual: 0.7.")
        if not 0 < self.step < 1:
            raise PlanishError(f"clip.step is {self.step}, but it lies between 0 and 1. Usual: 0.025.")

    def ratios(self) -> list[float]:
        """Falling from 1."""
        return [round(1 - i * self.step, 6) for i in range(int((1 - self.least) / self.step + 1e-9) + 1)]
