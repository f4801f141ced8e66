"""Flattening a site's input on its way through the walk: look at what arrives, let the steps choose a chain, give it to the readers, search the clip.

Shape suffixes: T tokens of a batch, S tokens of the sample, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calib.compressed.packing import clipped
from ..calib.machine.precision import bfloat16_products
from ..calib.walk.site_walk import SiteWalk
from ..calib.walk.stream import relative_error
from ..quant.errors import PlanishError
from ..quant.linear import without_first
from ..quant.solvers.clip_activation import best_clip
from ..quant.transforms import Flat, Keeping
from ..quant.transforms.auto import Auto, Choice
from ..quant.transforms.factors import Chain, on_input, rounded
from ..quant.transforms.flat import Learned
from ..quant.transforms.inputs import ClipSearch, InputStep, SiteView, chain_of
from ..quant.trial import Trial, decided
from .solving import Readers

MOMENT_TOKENS = 4096  # tokens that a site's moments are taken from, at most
SAMPLE_TOKENS = 512  # tokens that clips, seeds and choices are tried on, at most
HELD_TOKENS = 256  # of tokens held out, those that a choice is judged by, at most
HELD_OUT = 0.25  # share of the tokens that is held out where no step says it
TOLERANCE = 1e-3  # relative error of the readers' outputs in float32; right factors reach 1e-6


@dataclass(frozen=True, slots=True)
class Flattened:
    """What was done to a site. error: of the transformed readers in float32, relative, before anything is quantized.

    choice: of auto, if it ran. note: what the user should know.
    """

    chain: Chain
    error: float
    choice: Choice | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What stands for a Flat that is learned already."""

    found: Learned
    sites: tuple[str, ...] = ("*",)

    def chain(self, view: SiteView) -> Chain:
        """The factors, whatever arrives."""
        return self.found.chain

    def learned(self, view: SiteView) -> Learned:
        """With the clip."""
        return self.found


class Part:
    """What is known of some of a site's tokens: every so many enter the moments (coarse), and the sample (fine)."""

    def __init__(self, width: int, coarse: int, fine: int) -> None:
        self.second_CC, self.sum_C, self.count = torch.zeros(width, width), torch.zeros(width), 0
        self.samples: list[Tensor] = []
        self.coarse, self.fine = coarse, fine

    def add(self, x_TC: Tensor) -> None:
        """Of tokens that come next, those that count."""
        some_TC = x_TC[:: self.coarse].float()
        self.second_CC = self.second_CC.to(some_TC.device).addmm_(some_TC.T, some_TC)
        self.sum_C = self.sum_C.to(some_TC.device) + some_TC.sum(0)
        self.count += len(some_TC)
        self.samples.append(x_TC[:: self.fine].float())

    @property
    def sample_TC(self) -> Tensor:
        """All so far."""
        return torch.cat(self.samples)

    def view(self, readers: Readers) -> SiteView:
        """The site by these tokens."""
        scheme = None if readers.packed is None else readers.packed.scheme
        return SiteView(self.sample_TC, self.second_CC / self.count, self.sum_C / self.count, tuple(readers.weights.values()), scheme)

    def take(self, other: "Part") -> None:
        """The other's tokens too."""
        self.second_CC += other.second_CC
        self.sum_C += other.sum_C
        self.count += other.count
        self.samples += other.samples


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """A site's tokens: all of them, and apart those to fit to and those held out, if any are."""

    view: SiteView
    fit: SiteView | None = None
    held_TC: Tensor | None = None


def look_at(readers: Readers, walk: SiteWalk, keep_T: Sequence[Tensor], held_out: float = 0.0, sample: int = SAMPLE_TOKENS) -> Look:
    """Bring all batches to the site and look at the tokens kept, evenly spaced over all batches.

    held_out: the share of the last that are. sample: tokens of the sample, at most.
    """
    total = sum(int(keep.sum()) for keep in keep_T)
    border = min(max(1, round(total * (1 - held_out))), total - 1) if held_out else total
    if total < (2 if held_out else 1):
        raise PlanishError(f"site {readers.site.name}: every calibration token is a sink, so there is nothing to transform for. Give other text.")
    coarse = -(-total // MOMENT_TOKENS)
    first = Part(readers.width, coarse, -(-total // sample))
    held = Part(readers.width, coarse, max(1, -(-(total - border) // HELD_TOKENS)))
    done = 0
    for pass_, keep in zip(walk.arrivals(readers.site.name), keep_T, strict=True):
        assert pass_.x is not None
        x_TC = pass_.x if keep.all() else pass_.x[keep]
        here = max(0, border - done)
        for part, some_TC in ((first, x_TC[:here]), (held, x_TC[here:])):
            if len(some_TC):
                part.add(some_TC)
        done += len(x_TC)
    if not held_out:
        return Look(first.view(readers))
    fit, held_TC = first.view(readers), held.sample_TC
    first.take(held)
    return Look(first.view(readers), fit, held_TC)


def chosen(
    steps: Sequence[InputStep | Auto], clip: ClipSearch | None, readers: Readers, look: Look, stored: torch.dtype
) -> tuple[list[InputStep], Choice | None]:
    """The steps with what auto chooses in its place, if it is among them."""
    place = next((i for i, step in enumerate(steps) if isinstance(step, Auto)), len(steps))
    before, after = ([step for step in part if not isinstance(step, Auto)] for part in (steps[:place], steps[place + 1 :]))
    if place == len(steps):
        return before, None
    auto = steps[place]
    assert isinstance(auto, Auto)
    choice = decided(auto, before, after, trial_of(look, clip, readers, stored))
    return [*before, *auto.tried[choice.chosen], *after], choice


def trial_of(look: Look, clip: ClipSearch | None, readers: Readers, stored: torch.dtype) -> Trial:
    """What steps are tried on."""
    assert look.fit is not None
    assert look.held_TC is not None
    assert readers.packed is not None
    return Trial(look.fit, look.held_TC, readers.packed.scheme, (1.0,) if clip is None else clip.ratios(), stored)


def flatten(
    readers: Readers,
    steps: Sequence[InputStep | Auto],
    clip: ClipSearch | None,
    walk: SiteWalk,
    keep_T: Sequence[Tensor],
    stored: torch.dtype,
    where: str,
) -> Flattened:
    """Transform the readers for the chain that the steps choose, and set their clip. PlanishError at `where`: the layer is off afterwards."""
    held_out = next((step.held_out for step in steps if isinstance(step, Auto)), 0.0)
    tokens = max([SAMPLE_TOKENS, *(step.tokens for step in steps if isinstance(step, Flat))])
    look = look_at(readers, walk, keep_T, held_out, tokens)
    view = look.view
    with bfloat16_products(False):
        final, choice = chosen(steps, clip, readers, look, stored)
        chain, learned = _chain(final, view)
        chain, view = rounded(chain, stored), replace(view, sample_TC=view.sample_TC[:: -(-len(view.sample_TC) // SAMPLE_TOKENS)])
        before = _outputs(readers, view.sample_TC)
        readers.transform(chain, stored)
        sample_SC = on_input(chain, view.sample_TC)
        error = relative_error(before, _outputs(readers, sample_SC))
        if not error <= TOLERANCE:
            names = ", ".join(factor.kind for factor in chain)
            raise PlanishError(
                f"{where} ({names}): the transformed layer is off by {error:.2g} (at most {TOLERANCE:g}): a transform nearly singular."
            )
        for keeping in (step for step in steps if isinstance(step, Keeping)):
            readers.keep(keeping.kept(readers.width), keeping.bits, stored)
        sample_SC = without_first(sample_SC, readers.kept_channels)
    if clip is not None and readers.activations is not None and readers.activations.dynamic:
        assert readers.packed is not None
        behind = SiteView(sample_SC, view.second_CC, view.mean_C, tuple(readers.weights.values()))
        found = best_clip(sample_SC, behind.readers_CC, readers.activations, clip.ratios())
        readers.packed = clipped(readers.packed, found.clip)
    elif learned is not None and learned.clip is not None:
        assert readers.packed is not None
        readers.packed = clipped(readers.packed, learned.clip)
    note = "" if learned is None or learned.after < learned.before else "nothing learned, the start is kept"
    return Flattened(chain, error, choice, note)


def _chain(steps: Sequence[InputStep], view: SiteView) -> tuple[Chain, Learned | None]:
    """What the steps make of a site, one after the other; and what the last of them learned, if it did."""
    if not steps or not isinstance(steps[-1], Flat | Known):
        return chain_of(steps, view), None
    before = chain_of(steps[:-1], view)
    learned = steps[-1].learned(view.through(before))
    return (*before, *learned.chain), learned


def _outputs(readers: Readers, x_SC: Tensor) -> Tensor:
    """(S, O) of all readers side by side."""
    outputs = [torch.nn.functional.linear(x_SC, readers.whole(path), _float(readers.biases[path])) for path in readers.weights]
    return torch.cat(outputs, dim=1)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
