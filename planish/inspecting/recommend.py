"""A recipe for one model, from what an inspection measured: a shipped recipe of the wanted bits, changed where this model's figures say so.

Rules, in their order:
- bits: the shipped recipe with the same bits is the start, for w4a4 that of w4a8, which transforms nothing at run time; its solver is at home with
  what rounding costs here.
- activations: dynamic per token. A static range would have to hold the sink tokens' values, or clip them.
- smooth: at the sites (by name) where activations make most of the error, and where it falls with smoothing by at least GAIN, both in the median over
  blocks. Where 4-bit weights make most of it, smoothing looks well with rounding to nearest and is a loss with a solver (demo model, W4A8: perplexity
  25.1 without, 25.9 with smoothing of qkv alone, 26.1 of gate_up alone).
- groups: with 16-bit activations, the largest group size that servers run and every layer has.
- keep: with 4-bit activations, sites whose error stays above HARD after every step that the recipe can take run with 8-bit activations. Where these
  are most, the recipe is one of 8 bits with 4 at the others.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from ..calib.outliers.diagnosis import Choice, OutlierReport, Recommendation, SiteFigures
from ..quant.errors import PlanishError, nearest
from ..quant.formats import Scheme
from ..quant.transforms import Smooth
from ..recipe.schema import Override, Recipe, load_recipe, to_yaml

BASES: Mapping[str, str] = {"w8a8": "w8a8", "w4a8": "w4a8", "w4a16": "w4a16-g128", "w4a4": "w4a8"}
"""The wanted bits, and the shipped recipe that is the start."""
GAIN = 0.1  # share by which smoothing lowers a site's median error at least, to be worth its place
MOST = 0.5  # share of the squared error that activations make, from which they are what matters
HARD = 0.15  # relative error of a site's output
NAMED = 4


def check_bits(bits: str) -> str:
    """bits, or a PlanishError if nothing can be recommended for them."""
    if bits not in BASES:
        raise PlanishError(f"bits {bits}: nothing is recommended for them. {nearest(bits, BASES)}")
    return bits


def recommend(report: OutlierReport, bits: str) -> Recommendation | None:
    """The recipe for these bits; None for compressed and vision models, whose sites were not measured or which are not compressed."""
    check_bits(bits)
    if report.compressed or report.quality != "perplexity" or not all(site.errors for site in report.sites):
        return None
    advice = _Advice(report, bits)
    recipe = advice.recipe()
    reasons = (textwrap.wrap(f"{choice.what}: {choice.why}", 140, initial_indent="# ", subsequent_indent="#   ") for choice in advice.choices)
    text = "\n".join([*(line for lines in reasons for line in lines), to_yaml(recipe)])
    return Recommendation(recipe=text, scheme=bits, choices=tuple(advice.choices))


class _Advice:
    """The choices for one model, made one after the other."""

    def __init__(self, report: OutlierReport, bits: str) -> None:
        self.report, self.bits = report, bits
        self.choices: list[Choice] = []

    def recipe(self) -> Recipe:
        """The recipe; fills `choices` with the reasons."""
        base = load_recipe(BASES[self.bits])
        assert base.calibration is not None
        nearest_one = "the shipped recipe with these bits" if BASES[self.bits].startswith(self.bits) else "the shipped recipe that is nearest"
        self._choose(f"solver and calibration of {base.name}", nearest_one)
        text = base.calibration.source if self.report.text.startswith("builtin") else self.report.text
        wanted = self._scheme(base)
        steps = self._steps()
        scheme, overrides = self._overrides(wanted)
        return replace(
            base,
            name=f"{self.bits}-recommended",
            description=f"{self.bits.upper()} for {self.report.model}, as planish inspect recommends.",
            calibration=replace(base.calibration, source=text),
            steps=steps,
            scheme=scheme,
            overrides=overrides,
        )

    def _choose(self, what: str, why: str) -> None:
        self.choices.append(Choice(what=what, why=f"{why}."))

    def _scheme(self, base: Recipe) -> Scheme:
        weights, activations = base.scheme.weights, base.scheme.activations
        if self.bits == "w4a4":
            assert activations is not None
            activations = replace(activations, bits=4)
        if activations is not None:
            self._choose("activations scaled per token", self._spikes() or "each token's range is its own; no text need be representative of it")
        elif weights is not None and weights.group_size:
            self._choose(
                f"weights in groups of {weights.group_size}", "the largest that servers run; where it does not divide a layer, a smaller one"
            )
        return Scheme(weights=weights, activations=activations)

    def _spikes(self) -> str | None:
        """Why a static range would fail, in words."""
        limit = self.report.thresholds.site_spike
        spiked = [site for site in self.report.sites if site.sink_tokens and site.every.absmax > limit * site.ordinary.absmax]
        if not spiked:
            return None
        worst = max(spiked, key=_reach)
        return (
            f"sink tokens reach {_reach(worst):,.0f} times the others' maximum at {worst.name}"
            f"{_more(spiked, worst)}: a static range would clip them or waste its codes"
        )

    def _steps(self) -> tuple[Smooth, ...]:
        """Smoothing, by the names of the sites it helps."""
        if self.bits == "w4a16":
            self._choose("no smoothing", "activations stay as they are")
            return ()
        gains: dict[str, float] = {}
        driven: dict[str, float] = {}
        for name, sites in _by_name(site for site in self.report.sites if site.hosted).items():
            plain, smooth = (median(site.errors[self.bits][how] for site in sites) for how in ("plain", "smooth"))
            gains[name] = 1 - smooth / plain if plain else 0.0
            driven[name] = median(_of_activations(site, self.bits) for site in sites)
        if gains and max(driven.values()) < MOST:
            share = ", ".join(f"{name} {part:.0%}" for name, part in driven.items())
            self._choose("no smoothing", f"activations make little of the sites' {self.bits.upper()} errors ({share}), and weights would pay for it")
            return ()
        helped = [name for name, gain in gains.items() if gain >= GAIN and driven[name] >= MOST]
        said = f"median {self.bits.upper()} errors change by " + ", ".join(f"{-gain:+.0%} at {name}" for name, gain in gains.items())
        if not helped:
            self._choose("no smoothing", f"{said}: too little for what it costs the weights")
            return ()
        whole = len(helped) == len(_by_name(self.report.sites))
        self._choose(f"smoothing at {'every site' if whole else ', '.join(helped)}", said)
        return (Smooth(sites=("*",) if whole else tuple(f"*.{name}" for name in helped)),)

    def _overrides(self, scheme: Scheme) -> tuple[Scheme, tuple[Override, ...]]:
        """The scheme of most sites, and the sites that are an exception: those that 4-bit activations would ruin, or the only ones that bear them."""
        if self.bits != "w4a4":
            return scheme, ()
        hard = [site for site in self.report.sites if min(site.errors["w4a4"][how] for how in ("plain", "smooth")) > HARD]
        if not hard:
            return scheme, ()
        assert scheme.activations is not None
        worst = max(hard, key=lambda site: site.errors["w4a4"]["plain"])
        self._choose(
            f"8-bit activations at {len(hard)} of {len(self.report.sites)} sites",
            f"with 4 bits their outputs stay more than {HARD:.0%} off, {worst.name} by {worst.errors['w4a4']['plain']:.0%}",
        )
        eight = Scheme(weights=scheme.weights, activations=replace(scheme.activations, bits=8))
        if 2 * len(hard) <= len(self.report.sites):
            return scheme, (Override(sites=_patterns(hard, self.report.sites), scheme=eight),)
        soft = [site for site in self.report.sites if site not in hard]
        return eight, (Override(sites=_patterns(soft, self.report.sites), scheme=scheme),) if soft else ()


def _reach(site: SiteFigures) -> float:
    return site.every.absmax / site.ordinary.absmax if site.ordinary.absmax else float("inf")


def _of_activations(site: SiteFigures, bits: str) -> float:
    """The share of a site's squared error that its activations' rounding makes. At 8 bits the weights' is small beside it."""
    eight, mixed, four = (site.errors[scheme]["plain"] ** 2 for scheme in ("w8a8", "w4a8", "w4a4"))
    parts = {"w8a8": (eight, eight), "w4a8": (eight, mixed), "w4a4": (four - mixed, four)}
    part, whole = parts[bits]
    return part / whole if whole else 0.0


def _more(sites: Sequence[SiteFigures], worst: SiteFigures) -> str:
    others = [site.name for site in sites if site is not worst]
    if not others:
        return ""
    rest = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    return f" (and at least {math.floor(min(map(_reach, sites))):,} times at {', '.join(others[:NAMED])}{rest})"


def _by_name(sites: Iterable[SiteFigures]) -> dict[str, list[SiteFigures]]:
    found: dict[str, list[SiteFigures]] = {}
    for site in sites:
        found.setdefault(site.kind, []).append(site)
    return found


def _patterns(some: Sequence[SiteFigures], every: Sequence[SiteFigures]) -> tuple[str, ...]:
    """Patterns for these sites: *.kind where all of that kind are among them."""
    patterns: list[str] = []
    for name, sites in _by_name(some).items():
        whole = len(sites) == len(_by_name(every)[name])
        patterns += [f"*.{name}"] if whole else [site.name for site in sites]
    return tuple(patterns)
