"""Smoothing one block: the strength is tried on the block itself, the scales are absorbed by their hosts, the result is checked.

Shape suffixes: P probe samples, L tokens, D width; T = P * L; C channels of a site.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calib.observe import Observation
from .calib.precision import bfloat16_products
from .calib.runner import Call
from .calib.sites import Site, absorb, exact_scale, reader_bias, reader_weight, tie
from .calib.statistics import Extremes
from .calib.stream import relative_error
from .calib.walk import replaced
from .quant.errors import PlanishError
from .quant.formats import Scheme, scale_and_zero
from .quant.linear import QuantizedLinear, StaticGrid
from .quant.solvers import Rtn
from .quant.transforms.factors import Scale
from .quant.transforms.smooth import Smooth, smoothing_scale
from .resolve import matches

STRENGTHS = (0.45, 0.6, 0.75, 0.9)  # alphas tried by strength auto, besides none
TOLERANCE = 1e-3  # relative error of a transformed block in float32; right mappings reach 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A few tokens that go through block `index` again and again. keep_T: the tokens that are no sinks."""

    call: Call
    index: int
    hidden_PLD: Tensor
    keep_T: Tensor

    def run(self, block: nn.Module) -> Tensor:
        """A float32 block's output on the tokens kept: (kept, D)."""
        out = self.call.run(block, self.index, self.hidden_PLD.float())
        return out.flatten(0, 1)[self.keep_T]


@dataclass(frozen=True, slots=True, eq=False)
class Smoothing:
    """What was decided for one site: its scale (C,), the strength (None: not smoothed), and the block's error with every strength tried."""

    scale_C: Tensor | None
    strength: float | None
    tried: Mapping[str, float]


def static_grid(seen: Extremes, scheme: Scheme, divisor_C: Tensor | None = None) -> StaticGrid | None:
    """The static grid of a site from the range of the tokens kept; None if the scheme's activations are dynamic or not quantized."""
    fmt = scheme.activations
    if fmt is None or fmt.dynamic:
        return None
    low_C, high_C = seen.minimum_C.float(), seen.maximum_C.float()
    if divisor_C is not None:
        low_C, high_C = low_C / divisor_C, high_C / divisor_C
    scale, zero = scale_and_zero(low_C.amin().reshape(1, 1), high_C.amax().reshape(1, 1), fmt.bits, fmt.symmetric, torch.bfloat16)
    return StaticGrid(scale, zero)


def choose(
    block: nn.Module, sites: Mapping[str, Site], schemes: Mapping[str, Scheme | None], observed: Observation, step: Smooth, probe: Probe
) -> dict[str, Smoothing]:
    """The scales of the sites that have a free host, match the step and have quantized activations.

    block: float32, untouched on return. strength auto: for each site the one with which the block errs least on the probe when this site alone is
    quantized, its weights rounded to nearest.
    """
    reference = probe.run(block) if step.strength == "auto" else None
    chosen: dict[str, Smoothing] = {}
    for name, site in sites.items():
        scheme = schemes[name]
        if site.host is None or scheme is None or scheme.activations is None or not matches(step.sites, probe.index, name):
            continue
        seen, absmax_C = observed.seen[name], observed.seen[name].absmax_C
        driven_C = observed.sinks_C[name] > absmax_C  # by sink tokens alone: such a column is not to be made small beside its row
        weight_C = torch.stack([reader_weight(block.get_submodule(path)).abs().amax(0) for path in site.readers]).amax(0)
        strengths = STRENGTHS if step.strength == "auto" else (step.strength,)
        scales: dict[float | None, Tensor | None] = {}
        for strength in strengths:
            scale_C = smoothing_scale(absmax_C, weight_C, strength)
            scales[strength] = tie(site, torch.where(driven_C, scale_C.clamp(min=1), scale_C))
        errors: dict[float | None, float] = {}
        if reference is not None:
            scales = {None: None, **scales}
            for tried, on_trial_C in scales.items():
                with replaced(block, _rounded(block, site, scheme, seen, on_trial_C)):
                    errors[tried] = relative_error(reference, probe.run(block))
        best = min(scales, key=lambda strength: errors.get(strength, 0.0))
        chosen[name] = Smoothing(scales[best], best, {str(strength): error for strength, error in errors.items()})
    return chosen


def _rounded(block: nn.Module, site: Site, scheme: Scheme, seen: Extremes, scale_C: Tensor | None) -> dict[str, nn.Module]:
    """Stand-ins for the site's readers: rounded to nearest, with the scale on trial."""
    layers: dict[str, nn.Module] = {}
    assert scheme.weights is not None
    static = static_grid(seen, scheme, scale_C)
    for path in site.readers:
        module = block.get_submodule(path)
        w_OI, bias = reader_weight(module), reader_bias(module)
        weight = Rtn().solve(w_OI if scale_C is None else w_OI * scale_C, scheme.weights, None, torch.float32).weight
        layers[path] = QuantizedLinear(weight, bias, scheme.activations, static, () if scale_C is None else (Scale(scale_C),))
    return layers


def apply(
    block: nn.Module, sites: Mapping[str, Site], chosen: Mapping[str, Smoothing], probe: Probe, stored: torch.dtype
) -> tuple[float, dict[str, Tensor]]:
    """Absorb the scales into a float32 block and check that it computes what it did before.

    Returns the relative error of that check and the scales as they became: a norm's new weight is rounded to the stored dtype first,
    and the readers take the exact ratio.
    """
    scales = {name: smoothing.scale_C for name, smoothing in chosen.items() if smoothing.scale_C is not None}
    if not scales:
        return 0.0, {}
    exact = {}
    with bfloat16_products(False):
        before = probe.run(block)
        for name, scale_C in scales.items():
            exact[name] = exact_scale(block, sites[name], scale_C, stored)
            absorb(block, sites[name], exact[name])
        off = relative_error(before, probe.run(block))
    if not off <= TOLERANCE:
        raise PlanishError(
            f"smooth at block {probe.index} ({', '.join(exact)}): the transformed block is off by {off:.2g} (at most {TOLERANCE:g}). "
            "The topology's hosts or readers do not fit this model; leave the step out and report the model."
        )
    return off, exact
