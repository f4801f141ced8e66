"""FlatQuant (Sun et al. 2024, arXiv:2410.09426): an affine transform of a site's input and the clip of its activations, learned by descent.

x -> x T, W -> W T^-T, least of

    |(Q(x T) - x T) (W T^-T)'|^2 + balance |x T (Q(W T^-T) - W T^-T)'|^2

a mean over tokens, summed over the outputs of all readers, as a part of |x W'|^2. Q rounds with the straight-through gradient. T: flat_shapes.py.

Other than in the paper: what is made small is the error at the site, on the inputs that really arrive there, from quantized predecessors, unless
objective is block: then, as there, it is that of the block's output, all sites at once (planish/walk/together.py), though on inputs from quantized
predecessors too; a factor is descended by its entries, inverted by a solver (there: by its singular vectors and values); it can start from CAT; the
clip of weights is one for all readers and serves descent only, for the solver searches its own; keys and values are not quantized.

Descent multiplies in bfloat16, judgement in float32.

Shape suffixes: T tokens, C = I channels, O out channels, N rows with the readers' second moments.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from ..descent import Adam
from ..errors import PlanishError
from ..formats import Scheme
from ..products import bfloat16_products
from ..seeds import check_seed
from ..straight_through import rounded_input, rounded_weight
from .factors import Chain, on_input, on_weight
from .flat_shapes import BlockShape, KroneckerShape, Shape, Start
from .inputs import SiteView, check_block, divisor

BATCH, ROWS = 512, 256  # tokens and rows of weights of a step of descent
JUDGEMENTS = 4  # how often the chain is held against the tokens held out
HELD_OUT = 4  # of so many parts of the sample the last is held out
LEAST_OPEN = 0.98  # a clip that starts wider could not move: the sigmoid is flat there
JUDGED_TOKENS, JUDGED_ROWS = 2048, 512  # of the tokens held out and of the weights, where a chain is judged
SEARCH_TOKENS = 512  # on which the start's clip is searched
CLIPS = tuple(1 - i / 40 for i in range(13))  # of activations, of which the start has the best
WEIGHT_CLIP = 0.8  # where that of weights starts
WAYS, MATRICES, VALUE_SECONDS = 30, 12, 1.2e-7  # copies of a step's values, and of blocks; for each value of a step, measured
WEIGHT_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)  # tried wherever a chain is judged, as the solver will


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """clip: of the activations, None if not learned. before, after: the objective of the tokens held out, with the start and with the chain."""

    chain: Chain
    clip: float | None
    before: float
    after: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Flat:
    """structure kronecker: a scale of every channel, then L ⊗ R with factors as nearly alike as can be; blocks: of at most `block` channels, then a
    Hadamard over all. start: where descent begins (flat_shapes.py); damping: of its moments, as in cat.

    steps: of Adam. lr: how far the first step moves a channel's axis, relative to its length; it falls to 0 as a cosine. tokens: of the sample.
    balance: what the error of weights counts, 1 being that of rounding to nearest; less for a solver that makes up for most of it.
    objective: site: the error of the readers' outputs, one site after the other; block: of the block's output, all its sites at once, a batch of
    the calibration a step. block is for structure blocks, damping for start cat, tokens for objective site; elsewhere they are refused.
    clip: learn the activations' clip; it holds unless the recipe's step `clip` searches one.
    """

    structure: Literal["kronecker", "blocks"] = "kronecker"
    block: int = 128
    start: Start = "cat"
    damping: float = 0.02
    steps: int = 128
    lr: float = 0.04
    tokens: int = 16384
    balance: float = 0.3
    objective: Literal["site", "block"] = "site"
    clip: bool = True
    seed: int = 0
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        check_block("flat", self.block)
        check_seed("flat.seed", self.seed)
        if not 0 < self.damping <= 1:
            raise PlanishError(f"flat.damping is {self.damping}, but it is a part of the mean diagonal, above 0 and at most 1. Usual: 0.02.")
        if self.steps < 0:
            raise PlanishError(f"flat.steps is {self.steps}, but it counts steps of descent: 0 for the start alone. Usual: 128.")
        if not 0 < self.lr <= 1:
            raise PlanishError(f"flat.lr is {self.lr}, but it is the part of its length by which an axis moves, above 0 and at most 1. Usual: 0.04.")
        if self.tokens < HELD_OUT:
            raise PlanishError(f"flat.tokens is {self.tokens}, but one in {HELD_OUT} is held out, so there are more. Usual: 16384.")
        if not 0 <= self.balance <= 1:
            raise PlanishError(f"flat.balance is {self.balance}, but it is 0 (weights are exact) to 1 (weights are rounded to nearest). Usual: 0.3.")
        usual = {item.name: item.default for item in fields(self)}
        for name, key, value in (("block", "structure", "blocks"), ("damping", "start", "cat"), ("tokens", "objective", "site")):
            if getattr(self, key) != value and getattr(self, name) != usual[name]:
                raise PlanishError(
                    f"flat.{name} is {getattr(self, name)}, but only {key}: {value} makes use of it, and {key} is {getattr(self, key)}. "
                    f"Leave {name} out, or set {key}: {value}."
                )

    def held_bytes(self, width: int, weights: int, tokens: int) -> int:
        """In memory at the highest, about, at a site so wide with so many weights, of so many tokens: the sample, apart and moved; values of a step
        on their way; weights, moved in float64; numbers, slopes and inverses."""
        sample = 3 * min(tokens, self.tokens) + WAYS * BATCH
        return 4 * width * (sample + MATRICES * (divisor(width, self.block) if self.structure == "blocks" else 1)) + 16 * weights

    def seconds(self, width: int) -> float:
        """At a site so wide, about, with one core."""
        return self.steps * BATCH * width * VALUE_SECONDS

    def chain(self, view: SiteView) -> Chain:
        """The factors alone."""
        return self.learned(view).chain

    def shape(self, view: SiteView) -> Shape:
        """Where descent begins."""
        if self.structure == "kronecker":
            return KroneckerShape.of(view, self.start, self.damping, self.seed)
        return BlockShape.of(view, self.start, self.damping, divisor(len(view.second_CC), self.block))

    def learned(self, view: SiteView) -> Learned:
        """Start, descend, and take what is best on the tokens held out."""
        shape = self.shape(view)
        if view.scheme is None or view.scheme.weights is None or not bool(view.sample_TC.any() and view.readers_CC.any()):
            return Learned(shape.chain(), None, 0.0, 0.0)
        return _Descent(self, view, shape, view.scheme).run()


def input_error(y_TC: Tensor, v_NC: Tensor, scheme: Scheme, clip: Tensor) -> Tensor:
    """|(Q(y) - y) V'|^2, a mean over tokens; 0 where inputs are not quantized. y = x T, V' V = W' W of the transformed readers: a scalar."""
    if scheme.activations is None:
        return y_TC.new_zeros(())
    e_TC = rounded_input(y_TC, scheme.activations, clip) - y_TC
    return (e_TC @ v_NC.T).square().sum() / len(y_TC)


def weight_error(y_TC: Tensor, w_OC: Tensor, scheme: Scheme, clip: Tensor) -> Tensor:
    """|y (Q(W) - W)'|^2, a mean over tokens: a scalar. W: the transformed readers."""
    if scheme.weights is None:
        return y_TC.new_zeros(())
    d_OC = rounded_weight(w_OC, scheme.weights, clip) - w_OC
    return (y_TC @ d_OC.T).square().sum() / len(y_TC)


def learns_clip(step: Flat, scheme: Scheme) -> bool:
    """Whether the clip of activations is learned."""
    return step.clip and scheme.activations is not None and scheme.activations.dynamic


def start_clip(step: Flat, shape: Shape, view: SiteView) -> float:
    """The clip of activations with which descent begins: where it is learned, the start's best, the first of equals."""
    scheme = view.scheme
    if scheme is None or scheme.activations is None:
        return 1.0
    if not learns_clip(step, scheme):
        return scheme.activations.clip
    chain, w_OC = shape.chain(), torch.cat(list(view.weights))
    y_TC = on_input(chain, view.sample_TC[:: -(-len(view.sample_TC) // SEARCH_TOKENS)])
    v_NC = on_weight(chain, same_moments(w_OC))[0]
    return min(CLIPS, key=lambda ratio: float(input_error(y_TC, v_NC, scheme, torch.tensor(ratio))))


def same_moments(w_OC: Tensor) -> Tensor:
    """V with V' V = W' W, of C rows at most: (N, C)."""
    return w_OC if len(w_OC) <= w_OC.shape[1] else torch.linalg.qr(w_OC, mode="r").R


class _Descent:
    """From a shape's start on. x: tokens, held: those held out; W: all readers' rows; V: rows with the same second moments, C at most."""

    def __init__(self, settings: Flat, view: SiteView, shape: Shape, scheme: Scheme) -> None:
        self.settings, self.shape, self.scheme = settings, shape, scheme
        held = len(view.sample_TC) // HELD_OUT
        used_TC, held_TC = (view.sample_TC[:-held], view.sample_TC[-held:]) if held else (view.sample_TC, view.sample_TC)
        self.held_TC = held_TC[:: -(-len(held_TC) // JUDGED_TOKENS)]
        w_OC = torch.cat(list(view.weights))
        v_NC = same_moments(w_OC)
        self.judged_OC, self.judged_NC = w_OC[:: -(-len(w_OC) // JUDGED_ROWS)], v_NC
        self.size = float((self.held_TC @ v_NC.T).square().sum()) / len(self.held_TC)
        self.x_TC = on_input(shape.front, used_TC)
        self.w_OC, self.v_NC = on_weight(shape.front, w_OC)[0], on_weight(shape.front, v_NC)[0]
        self.outputs = len(w_OC)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.learns = learns_clip(settings, scheme)
        ratio = start_clip(settings, shape, replace(view, sample_TC=self.held_TC))
        self.fixed, self.best = torch.tensor(ratio), Learned(shape.chain(), ratio if self.learns else None, math.nan, math.nan)
        self.logits = [torch.tensor(ratio).logit().requires_grad_() for ratio in (min(ratio, LEAST_OPEN), WEIGHT_CLIP)]

    def run(self) -> Learned:
        """The best chain met, never worse than the start on the tokens held out."""
        before = self._judged(self.best.chain, self.best.clip)
        self.best = replace(self.best, before=before, after=before)
        with torch.enable_grad():
            for done in self._steps():
                if done % max(1, self.settings.steps // JUDGEMENTS) == 0 or done == self.settings.steps:
                    self._judge()
        return self.best

    def _steps(self) -> Iterator[int]:
        """Descend, and after each step say how many there were."""
        settings = self.settings
        optimizer = Adam([*self.shape.groups(settings.lr), (self.logits[not self.learns :], settings.lr)])
        for i in range(settings.steps):
            with bfloat16_products(True):
                slopes = torch.autograd.grad(self._loss(), optimizer.numbers)
            optimizer.step(slopes, (1 + math.cos(math.pi * i / settings.steps)) / 2)
            yield i + 1

    def _loss(self) -> Tensor:
        """Of some tokens, and some rows of the weights."""
        x_TC, w_OC = self._some(self.x_TC, BATCH), self._some(self.w_OC, ROWS)
        inward, outward = self.shape.chains()
        y_TC = on_input(inward, x_TC)
        clip, weight_clip = (logit.sigmoid() for logit in self.logits)
        loss = input_error(y_TC, on_input(outward, self.v_NC), self.scheme, clip if self.learns else self.fixed)
        more = weight_error(y_TC[:ROWS], on_input(outward, w_OC), self.scheme, weight_clip) * (self.outputs / len(w_OC))
        return (loss + self.settings.balance * more) / self.size

    def _some(self, rows_RC: Tensor, count: int) -> Tensor:
        """So many of the rows, by the seed; all if there are no more."""
        if len(rows_RC) <= count:
            return rows_RC
        return rows_RC[torch.randperm(len(rows_RC), generator=self.generator)[:count].to(rows_RC.device)]

    @torch.no_grad()
    def _judge(self) -> None:
        chain, clip = self.shape.chain(), float(self.logits[0].sigmoid()) if self.learns else None
        if not all(tensor.isfinite().all() for factor in chain for tensor in factor.tensors().values()):
            return
        after = self._judged(chain, clip)
        if after < self.best.after:
            self.best = Learned(chain, clip, self.best.before, after)

    def _judged(self, chain: Chain, clip: float | None) -> float:
        """The objective of the tokens held out, in float32, with the best of a few clips of the weights."""
        y_TC, w_OC = on_input(chain, self.held_TC), on_weight(chain, self.judged_OC)[0]
        error = input_error(y_TC, on_weight(chain, self.judged_NC)[0], self.scheme, self.fixed if clip is None else torch.tensor(clip))
        more = min(weight_error(y_TC, w_OC, self.scheme, torch.tensor(ratio)) for ratio in WEIGHT_CLIPS)
        return float(error + self.settings.balance * more * (self.outputs / len(w_OC))) / self.size
