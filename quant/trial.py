"""What quantization costs a site behind a chain, measured: how far the readers' outputs are off on tokens that the chain was not fitted to.

error² = |Q(x T) Q(W T^-T)' - x W'|² / |x W'|² over the held-out tokens x and some rows of W, all as the layer will compute them but for the weights,
which are rounded to nearest with a clip search instead of solved for. At 14 sites of the demo model GPTQ on all rows, on moments of the quantized
input, put all pairs of eight candidates that it finds more than 2 % apart in the same order: 368 of 368.

Shape suffixes: T tokens, C channels, O out channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .formats import ActivationFormat, Scheme
from .linear import quantize_input, without_first
from .solvers.clip import Clip
from .solvers.rtn import Rtn
from .transforms.auto import Auto, Choice, cost
from .transforms.factors import Chain, on_input, on_weight, rounded
from .transforms.inputs import InputStep, SiteView, chain_of
from .transforms.side import Quad, Resq

ROWS = 256  # output channels that are looked at, evenly spaced over each reader
STAND_IN = Rtn(clip=Clip(grid=20))  # for the solver


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """What transforms are tried on at a site.

    fit: what they are fitted to; held_TC: tokens that they are judged by. scheme: of the site. ratios: that the clip of dynamic activations will be
    one of. stored: what tensors will be stored in.
    """

    fit: SiteView
    held_TC: Tensor
    scheme: Scheme
    ratios: Sequence[float] = (1.0,)
    stored: torch.dtype = torch.float32

    @property
    def rows_OC(self) -> Tensor:
        """About ROWS rows of the readers' weights."""
        step = -(-sum(map(len, self.fit.weights)) // ROWS)
        return torch.cat([w_OC[::step] for w_OC in self.fit.weights])


def decided(auto: Auto, before: Sequence[InputStep], after: Sequence[InputStep], trial: Trial) -> Choice:
    """What `auto` chooses at a site where these other steps come before and after it."""
    first = rounded(chain_of(before, trial.fit), trial.stored)
    view = trial.fit.through(first) if first else trial.fit
    kept = sum(step.kept(trial.held_TC.shape[1]) for step in after if isinstance(step, Quad | Resq))
    chains = [(*first, *rounded(chain_of([*candidate, *after], view), trial.stored)) for candidate in auto.tried]
    return auto.choose([output_error(chain, trial, kept) for chain in chains], [cost(chain) for chain in chains])


@torch.no_grad()
def output_error(chain: Chain, trial: Trial, kept: int = 0, *, weights: bool = True) -> float:
    """The error behind the chain, relative. kept: so many first channels do not become codes. weights: whether they are quantized too."""
    rows_OC, fmt = trial.rows_OC, trial.scheme.weights
    w_OC = without_first(on_weight(chain, rows_OC)[0], kept)
    fit_TC, x_TC = (without_first(on_input(chain, part_TC), kept) for part_TC in (trial.fit.sample_TC, trial.held_TC))
    coded_TC, solved_OC = x_TC, w_OC
    if trial.scheme.activations is not None:
        coded_TC = quantize_input(x_TC, _clipped(fit_TC, w_OC, trial.scheme.activations, trial.ratios)).dequantize()
    if weights and fmt is not None:
        solved_OC = STAND_IN.solve(w_OC, fmt, None, trial.stored).weight.dequantize()
    off, size = _squares(coded_TC @ solved_OC.T - x_TC @ w_OC.T), _squares(trial.held_TC @ rows_OC.T)
    return (off / size) ** 0.5 if size else 0.0


def _clipped(x_TC: Tensor, w_OC: Tensor, fmt: ActivationFormat, ratios: Sequence[float]) -> ActivationFormat:
    """With the ratio that costs least, the first of equals: as clip_activation.best_clip, for fewer rows than channels."""
    if len(ratios) == 1:
        return replace(fmt, clip=fmt.clip if ratios[0] == 1 else ratios[0])
    formats = [replace(fmt, clip=ratio) for ratio in ratios]
    return min(formats, key=lambda clipped: _squares((quantize_input(x_TC, clipped).dequantize() - x_TC) @ w_OC.T))


def _squares(x: Tensor) -> float:
    return x.square().sum(dtype=torch.float64).item()
