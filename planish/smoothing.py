"""Smoothing one block: the strength is tried on the block itself, the scales are absorbed by their hosts, the result is checked.

Shape suffixes: P probe samples, L tokens, D width; T = P * L; C channels of a site.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calib.precision import bfloat16_products
from .calib.runner import Call
from .calib.statistics import ChannelStatistics
from .calib.stream import relative_error
from .calib.sites import Site, absorb, exact_scale, reader_weight, tie
from .calib.walk import replaced
from .quant.errors import PlanishError
from .quant.formats import Scheme, scale_and_zero
from .quant.linear import QuantizedLinear, StaticGrid
from .quant.solvers import Rtn
from .quant.transforms.smooth import Smooth, smoothing_scale
from .resolve import matches

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # alphas tried by strength auto, besides none
TOLERANCE = 1e-3  # relative error of a transformed block in float32; right mappings reach 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A few tokens that go through block `index` again and again. keep_T: the tokens that are no sinks."""

    call: Call
    index: int
    hidden_PLD: Tensor
    keep_T: Tensor

    def run(self, block: nn.Module, dtype: torch.dtype) -> Tensor:
        """The block's output on the tokens kept: (kept, D)."""
        out = self.call.run(block, self.index, self.hidden_PLD.to(dtype))
        return out.flatten(0, 1)[self.keep_T]


@dataclass(frozen=True, slots=True, eq=False)
class Smoothing:
    """What was decided: scales (C,) by site name, the strength (None: not smoothed), the errors of every strength tried."""

    scales: Mapping[str, Tensor]
    strength: float | None
    tried: Mapping[str, float]


def static_grid(seen: ChannelStatistics, scheme: Scheme, divisor_C: Tensor | None = None) -> StaticGrid | None:
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
    block: nn.Module, sites: Mapping[str, Site], schemes: Mapping[str, Scheme | None], seen: Mapping[str, ChannelStatistics], step: Smooth, probe: Probe
) -> Smoothing:
    """The scales of the sites that have a free host, match the step and have quantized activations.

    block: in its working dtype, untouched on return. strength auto: the one whose rounded-to-nearest block errs least on the probe.
    """
    chosen = [
        site
        for site in sites.values()
        if site.host is not None and _activations(schemes[site.name]) and matches(step.sites, probe.index, site.name)
    ]
    if not chosen:
        return Smoothing({}, None, {})
    weight_C = {site.name: torch.stack([reader_weight(block.get_submodule(r)).abs().amax(0).float() for r in site.readers]).amax(0) for site in chosen}

    def scales(strength: float) -> dict[str, Tensor]:
        return {s.name: tie(s, smoothing_scale(seen[s.name].absmax_C.float(), weight_C[s.name], strength)) for s in chosen}

    if step.strength != "auto":
        return Smoothing(scales(step.strength), step.strength, {})
    dtype = next(block.parameters()).dtype
    reference = probe.run(block, dtype)

    def error(candidate: Mapping[str, Tensor]) -> float:
        with replaced(block, _rounded(block, sites, schemes, seen, candidate, dtype)):
            return relative_error(reference, probe.run(block, dtype))

    candidates: dict[float | None, dict[str, Tensor]] = {None: {}, **{a: scales(a) for a in STRENGTHS}}
    errors = {strength: error(candidate) for strength, candidate in candidates.items()}
    best = min(errors, key=lambda strength: errors[strength])
    return Smoothing(candidates[best], best, {str(strength): value for strength, value in errors.items()})


def _activations(scheme: Scheme | None) -> bool:
    return scheme is not None and scheme.activations is not None


def _rounded(
    block: nn.Module,
    sites: Mapping[str, Site],
    schemes: Mapping[str, Scheme | None],
    seen: Mapping[str, ChannelStatistics],
    scales: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, nn.Module]:
    """Stand-ins for the readers: rounded to nearest, with the scales on trial."""
    layers: dict[str, nn.Module] = {}
    for site in sites.values():
        scheme, scale_C = schemes[site.name], scales.get(site.name)
        if scheme is None or scheme.weights is None:
            continue
        static = static_grid(seen[site.name], scheme, scale_C)
        for path in site.readers:
            module = block.get_submodule(path)
            w_OI = reader_weight(module).float()
            weight = Rtn().solve(w_OI if scale_C is None else w_OI * scale_C, scheme.weights, None, dtype).weight
            layers[path] = QuantizedLinear(weight, module.bias, scheme.activations, static, scale_C, dtype)
    return layers


def apply(block: nn.Module, sites: Mapping[str, Site], smoothing: Smoothing, probe: Probe, stored: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """Absorb the scales into a float32 block and check that it computes what it did before.

    Returns the relative error of that check and the scales as they became: a norm's new weight is rounded to the stored dtype first,
    and the readers take the exact ratio.
    """
    if not smoothing.scales:
        return 0.0, {}
    exact = {}
    with bfloat16_products(False):
        before = probe.run(block, torch.float32)
        for name, scale_C in smoothing.scales.items():
            exact[name] = exact_scale(block, sites[name], scale_C, stored)
            absorb(block, sites[name], exact[name])
        off = relative_error(before, probe.run(block, torch.float32))
    if not off <= TOLERANCE:
        raise PlanishError(
            f"smooth at block {probe.index} ({', '.join(exact)}): the transformed block is off by {off:.2g} (at most {TOLERANCE:g}). "
            "The topology's hosts or readers do not fit this model; leave the step out and report the model."
        )
    return off, exact
