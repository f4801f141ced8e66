"""Scaling one block (smooth, scale_rms): the strength is tried on the block itself, the scales are absorbed by their hosts, the result is checked.

Shape suffixes: P probe samples, L tokens, D width; T = P * L; C channels of a site.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calib.blocks.experts import Routes, routed_alike, seeing_all
from ..calib.blocks.prefix import PrefixStream
from ..calib.blocks.sites import Site, absorb, exact_scale, reader_bias, reader_weight, tie
from ..calib.machine.precision import bfloat16_products
from ..calib.walk.observe import Observation
from ..calib.walk.recorded import recording
from ..calib.walk.runner import Call
from ..calib.walk.site_walk import replaced, site_inputs
from ..calib.walk.statistics import Extremes
from ..calib.walk.stream import relative_error
from ..quant.errors import PlanishError
from ..quant.formats import NVFP4, Factored, Scheme, scale_and_zero
from ..quant.linear import QuantizedLinear, StaticGrid
from ..quant.solvers import Rtn
from ..quant.transforms.factors import Chain, Scale, on_input, on_weight
from ..quant.transforms.scale_rms import ScaleRms, rms_scale
from ..quant.transforms.smooth import Smooth, smoothing_scale
from ..recipe.resolve import matches

STRENGTHS = (0.45, 0.6, 0.75, 0.9)  # alphas tried by strength auto, besides none
EXPONENTS = (0.25, 0.5, 0.75, 1.0)  # likewise by exponent auto
TOLERANCE = 1e-3  # relative error of a transformed block in float32; right mappings reach 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A few tokens that go through block `index` again and again. keep_T: the tokens that are no sinks; prefix: what stands before all."""

    call: Call
    index: int
    hidden_PLD: Tensor
    keep_T: Tensor
    prefix: PrefixStream | None = None

    def run(self, block: nn.Module) -> Tensor:
        """A float32 block's output on the tokens kept: (kept, D)."""
        out = self.call.run(block, self.index, self.hidden_PLD.float())
        return out.flatten(0, 1)[self.keep_T]


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """What was decided for one site: its scale (C,), the step's strength or exponent (None: not scaled), and the block's error with each tried."""

    step: Smooth | ScaleRms
    scale_C: Tensor | None
    setting: float | None
    tried: Mapping[str, float]


Behind = Callable[[str, Tensor], Chain]
"""behind(site, x): what the site's input x (T, C) goes through behind the scale, as far as that does not hang on the scale."""


def static_grid(seen: Extremes, sinks_C: Tensor, scheme: Scheme, divisor_C: Tensor | None = None, shifts: Chain = ()) -> StaticGrid | None:
    """What is fixed of a site's grid: the static one, from the range of the tokens kept; the factor of NVFP4, which reaches twice as far as any
    token. None if the scheme's activations are dynamic in all, or not quantized.

    sinks_C: the sink tokens' absolute maxima. divisor_C, shifts: what the channels are divided by, and what is then taken from them, before they are
    quantized."""
    fmt = scheme.activations
    if fmt is None or not fmt.calibrated:
        return None
    low_C, high_C = _ends((seen.minimum_C, seen.maximum_C), divisor_C, shifts)
    if fmt.kind == NVFP4:
        sinks_2C = _ends((-sinks_C, sinks_C), divisor_C, shifts)
        reach = max(float(end.abs().amax()) for end in (low_C, high_C, sinks_2C))
        return StaticGrid(low_C.new_ones(1, 1) / Factored.reaching(reach).factor, None)
    scale, zero = scale_and_zero(low_C.amin().reshape(1, 1), high_C.amax().reshape(1, 1), fmt.kind, fmt.symmetric, torch.bfloat16)
    return StaticGrid(scale, zero)


def _ends(ends_C: tuple[Tensor, Tensor], divisor_C: Tensor | None, shifts: Chain) -> Tensor:
    """Both ends of every channel's range behind divisor and shifts: (2, C) float32."""
    both_2C = torch.stack(ends_C).float()
    return on_input(shifts, both_2C if divisor_C is None else both_2C / divisor_C)


def sink_ratio(seen: Extremes, sinks_C: Tensor, divisor_C: Tensor | None, shifts: Chain = ()) -> float:
    """How many times as far from zero as ordinary tokens sinks may reach behind divisor and shifts: at least 1, NaN if all is 0.

    sinks_C: their absolute maxima. Only where these exceed the ordinary ones do sinks count: of their sign nothing is known, and a shift moves both.
    """
    beyond_C = sinks_C > seen.absmax_C
    low_C, high_C = torch.where(beyond_C, -sinks_C, seen.minimum_C), torch.where(beyond_C, sinks_C, seen.maximum_C)
    reach, usual = (_ends(ends, divisor_C, shifts).abs().amax() for ends in ((low_C, high_C), (seen.minimum_C, seen.maximum_C)))
    return float(reach / usual)


def scaler(steps: Sequence[Smooth | ScaleRms], block: int, site: str) -> Smooth | ScaleRms | None:
    """The step that scales the site, if any."""
    return next((step for step in steps if matches(step.sites, block, site)), None)


def choose(
    block: nn.Module,
    sites: Mapping[str, Site],
    schemes: Mapping[str, Scheme | None],
    observed: Observation,
    steps: Sequence[Smooth | ScaleRms],
    probe: Probe,
    behind: Behind,
    centred: Collection[str] = (),
) -> dict[str, Scaling]:
    """The scales of the sites that have a free host, match a step and have quantized activations.

    block: float32, untouched on return. strength or exponent auto: for each site the one with which the block errs least on the probe when this site
    alone is quantized, its weights rounded to nearest. centred: sites that a shift makes symmetric: what smoothing looks at is half of their range.
    """
    chosen: dict[str, Scaling] = {}
    reference: Tensor | None = None
    seen_TC: dict[str, Tensor] = {}
    still: Mapping[str, dict[str, nn.Module]] = {}
    for name, site in sites.items():
        scheme, step = schemes[name], scaler(steps, probe.index, name)
        if site.host is None or scheme is None or scheme.activations is None or step is None:
            continue
        scales = _scales(block, site, observed, step, name in centred)
        errors: dict[float | None, float] = {}
        if _auto(step):
            if reference is None:
                with site_inputs(block, list(sites.values())) as inputs, recording(block, list(sites.values())) as still:
                    reference = probe.run(block)
                seen_TC = {at: x_TC[probe.keep_T] for at, x_TC in inputs.take().items()}
            scales = {None: None, **scales}
            chain = behind(name, seen_TC[name])
            for tried, on_trial_C in scales.items():
                with seeing_all(block), replaced(block, {**still[name], **_rounded(block, site, scheme, observed, on_trial_C, chain)}):
                    errors[tried] = relative_error(reference, probe.run(block))
        best = min(scales, key=lambda setting: errors.get(setting, 0.0))
        chosen[name] = Scaling(step, scales[best], best, {str(setting): error for setting, error in errors.items()})
    return chosen


def _auto(step: Smooth | ScaleRms) -> bool:
    return (step.strength if isinstance(step, Smooth) else step.exponent) == "auto"


def _scales(block: nn.Module, site: Site, observed: Observation, step: Smooth | ScaleRms, centred: bool) -> dict[float | None, Tensor | None]:
    """The scales to choose from, by strength or exponent."""
    absmax_C = observed.seen[site.name].absmax_C
    driven_C = observed.sinks_C[site.name] > absmax_C  # by sink tokens alone: such a column is not to be made small beside its row
    weights = [reader_weight(block.get_submodule(path)) for path in site.readers]
    made: dict[float, Tensor] = {}
    if isinstance(step, Smooth):
        weight_C = torch.stack([w_OC.abs().amax(0) for w_OC in weights]).amax(0)
        if centred:
            absmax_C = (observed.seen[site.name].maximum_C.float() - observed.seen[site.name].minimum_C.float()) / 2
        for strength in STRENGTHS if step.strength == "auto" else (step.strength,):
            made[strength] = smoothing_scale(absmax_C, weight_C, strength)
    else:
        square_C = torch.stack([w_OC.square().sum(0) for w_OC in weights]).sum(0)
        for exponent in EXPONENTS if step.exponent == "auto" else (step.exponent,):
            made[exponent] = rms_scale(observed.square_C[site.name], square_C, exponent)
    return {setting: tie(site, torch.where(driven_C, scale_C.clamp(min=1), scale_C)) for setting, scale_C in made.items()}


def _rounded(block: nn.Module, site: Site, scheme: Scheme, observed: Observation, scale_C: Tensor | None, behind: Chain) -> dict[str, nn.Module]:
    """Stand-ins for the site's readers: rounded to nearest, with the scale on trial and what is behind it."""
    layers: dict[str, nn.Module] = {}
    assert scheme.weights is not None
    static = static_grid(observed.seen[site.name], observed.sinks_C[site.name], scheme, scale_C)
    chain = behind if scale_C is None else (Scale(scale_C), *behind)
    for path in site.readers:
        module = block.get_submodule(path)
        w_OI, _ = on_weight(chain, reader_weight(module))
        weight = Rtn().solve(w_OI, scheme.weights, None, torch.float32).weight
        layers[path] = QuantizedLinear(weight, reader_bias(module), scheme.activations, static, chain)
    return layers


def absorb_scales(block: nn.Module, sites: Mapping[str, Site], chosen: Mapping[str, Scaling], stored: torch.dtype) -> dict[str, Tensor]:
    """Let the hosts take the scales, and return them as they became: a norm's new weight is rounded to the stored dtype first, and the readers take
    the exact ratio. block: float32."""
    exact: dict[str, Tensor] = {}
    for name, scaling in chosen.items():
        if scaling.scale_C is not None:
            exact[name] = exact_scale(block, sites[name], scaling.scale_C, stored)
            absorb(block, sites[name], exact[name])
    return exact


def checked(block: nn.Module, probe: Probe, what: str, change: Callable[[], None]) -> float:
    """Change a float32 block and return by how much, relative, it computes something else. PlanishError if that is more than rounding."""
    routes = Routes()
    with bfloat16_products(False), routed_alike(block, routes):
        before = probe.run(block)
        change()
        off = max(relative_error(before, probe.run(block)), routes.error)
    if not off <= TOLERANCE:
        raise PlanishError(
            f"{what}: the transformed block is off by {off:.2g} (at most {TOLERANCE:g}). "
            "The topology's hosts or readers do not fit this model; leave the step out and report the model."
        )
    return off
