"""Flattening a site's input on its way through the walk: look at what arrives, let the steps choose a chain, give it to the readers, search the clip.

Shape suffixes: T tokens of a batch, S tokens of the sample, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .calib.packing import clipped
from .calib.precision import bfloat16_products
from .calib.stream import relative_error
from .calib.walk import SiteWalk
from .quant.errors import PlanishError
from .quant.linear import without_first
from .quant.solvers.clip_activation import best_clip
from .quant.transforms import Flat, Keeping
from .quant.transforms.factors import Chain, on_input, rounded
from .quant.transforms.flat import Learned
from .quant.transforms.inputs import ClipSearch, InputStep, SiteView
from .solving import Readers

MOMENT_TOKENS = 4096  # tokens that a site's moments are taken from, at most
SAMPLE_TOKENS = 512  # tokens that clips, seeds and choices are tried on, at most
TOLERANCE = 1e-3  # relative error of the readers' outputs in float32; right factors reach 1e-6


@dataclass(frozen=True, slots=True)
class Flattened:
    """What was done to a site. error: of the transformed readers in float32, relative, before anything is quantized.

    note: what the user should know.
    """

    chain: Chain
    error: float
    note: str = ""


def view_of(readers: Readers, walk: SiteWalk, keep_T: Sequence[Tensor], sample: int = SAMPLE_TOKENS) -> SiteView:
    """Bring all batches to the site and look at the tokens kept, evenly spaced over all batches. sample: tokens of it, at most."""
    total = sum(int(keep.sum()) for keep in keep_T)
    coarse, fine = max(1, -(-total // MOMENT_TOKENS)), max(1, -(-total // sample))
    width = readers.width
    second_CC, sum_C, count, samples = torch.zeros(width, width), torch.zeros(width), 0, []
    for pass_, keep in zip(walk.arrivals(readers.site.name), keep_T, strict=True):
        assert pass_.x is not None
        x_TC = pass_.x if keep.all() else pass_.x[keep]
        some_TC = x_TC[::coarse].float()
        second_CC = second_CC.to(some_TC.device).addmm_(some_TC.T, some_TC)
        sum_C = sum_C.to(some_TC.device) + some_TC.sum(0)
        count += len(some_TC)
        samples.append(x_TC[::fine].float())
    if not count:
        raise PlanishError(f"site {readers.site.name}: every calibration token is a sink, so there is nothing to transform for. Give other text.")
    scheme = None if readers.packed is None else readers.packed.scheme
    return SiteView(torch.cat(samples), second_CC / count, sum_C / count, tuple(readers.weights.values()), scheme)


def flatten(
    readers: Readers, steps: Sequence[InputStep], clip: ClipSearch | None, walk: SiteWalk, keep_T: Sequence[Tensor], stored: torch.dtype, where: str
) -> Flattened:
    """Transform the readers for the chain that the steps choose, and set their clip. PlanishError at `where`: the layer is off afterwards."""
    view = view_of(readers, walk, keep_T, max([SAMPLE_TOKENS, *(step.tokens for step in steps if isinstance(step, Flat))]))
    with bfloat16_products(False):
        chain, learned = _chosen(steps, view)
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
    return Flattened(chain, error, note)


def _chosen(steps: Sequence[InputStep], view: SiteView) -> tuple[Chain, Learned | None]:
    """What the steps make of a site, one after the other; and what the last of them learned, if it did."""
    chain: Chain = ()
    learned = None
    for step in steps:
        learned = step.learned(view) if isinstance(step, Flat) else None
        more = step.chain(view) if learned is None else learned.chain
        chain, view = (*chain, *more), view.through(more)
    return chain, learned


def _outputs(readers: Readers, x_SC: Tensor) -> Tensor:
    """(S, O) of all readers side by side."""
    outputs = [torch.nn.functional.linear(x_SC, readers.whole(path), _float(readers.biases[path])) for path in readers.weights]
    return torch.cat(outputs, dim=1)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
