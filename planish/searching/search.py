"""Mixed precision: which weight format each site of a model gets, so that the whole diverges least from the original within a budget of bits.

Costs are measured at each site alone and added up (measuring.py); an integer program finds the best choice (quant/allocation.py). Readers of one site
(q, k and v; gate and up) always share a format, and so do the experts of a block, as servers that fuse them demand. The result is a recipe with
overrides.
"""

import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..calib.blocks.sites import kind_of
from ..calib.walk.runner import BlockRunner
from ..common.units import size
from ..compressing.absorbed import AbsorbedBlocks
from ..planning.preflight import Plan, make_plan
from ..planning.servers import runs_experts
from ..quant.allocation import allocate, smallest
from ..quant.errors import PlanishError
from ..quant.formats import Scheme
from ..recipe.resolve import Address
from ..recipe.schema import Override, Recipe, load_recipe
from ..walk.callbacks import Progress, Silent
from .budget import Budget, Weights
from .candidates import TARGETS, Target, at_site, names_for
from .measuring import Choices, MeasuredSite, measure, place, space, together

TOKENS = 8192  # of the calibration's, that solvers are shown at most, but one sample at least


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found. recipe: to compress with. chosen: the option of each of sites, by name.

    bits_per_weight: of all weights at these sites, with scales and zero points, 16 or so where they stay in full precision. bytes: of the whole
    checkpoint's weights. speedup: how many times quicker than in full precision text is written, by the model of budget.py. cost: the expected
    divergence from the original, in nats per token: the sum over sites. uniform: for each candidate that every site has, bits per weight and cost of
    taking it everywhere. tokens: that divergence was measured on.
    """

    recipe: Recipe
    sites: tuple[MeasuredSite, ...]
    chosen: tuple[str, ...]
    bits_per_weight: float
    bytes: int
    speedup: float
    cost: float
    uniform: Mapping[str, tuple[float, float]]
    tokens: int
    seconds: float


def search(
    recipe: Recipe | str | Path,
    model: str | Path,
    budget: str,
    *,
    bandwidth: str | None = None,
    candidates: Sequence[str] | None = None,
    target: Target = "vllm",
    every: bool = False,
    tokens: int = 512,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    offload_dir: str | Path | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> SearchResult:
    """The recipe with the weight format of every site that it quantizes chosen so that the model diverges least within the budget.

    budget: bits per weight at these sites, such as 4.5bpw, the size of the whole checkpoint, such as 80MB, or the speed of writing text, such as 2x
    or, where the memory gives `bandwidth` (such as 50GB/s), 60tok/s; see budget.py. candidates: names as of candidates.py
    (default: those usual for the target); only what the target runs is taken. every: measure the divergence of every candidate at every site, not of
    one only; as many times slower. tokens: of the calibration's, that divergence is measured on. dtype: of the arithmetic (default: float32).
    Raises PlanishError: as make_plan; a budget that no choice keeps, with the smallest that one does; nothing to choose from.
    """
    start, progress = time.monotonic(), progress or Silent()
    limit = Budget.of(budget, bandwidth)
    names = names_for(_target(target), candidates)
    plan = _plan(recipe, model, target, device, dtype, offload_dir, allow_pickle)
    assert plan.ids is not None
    choices = _choices(plan, names, target)
    scope = _Scope.of(plan, choices)
    if plan.topology.routers and limit.kind in ("x", "tok/s"):
        raise PlanishError(
            f"budget {budget}: a mixture's tokens read only the experts that they are sent to, which this model of speed leaves out. Give bits per "
            "weight, such as 4.5bpw, or a size."
        )
    scope.check(limit)
    fit_NL, held_NL = split(plan.ids, tokens)
    with _folder(plan) as folder:
        around = None if every else scope.weights.bits(limit.allowance(scope.weights))
        sites = measure(AbsorbedBlocks(replace(plan, ids=fit_NL), progress, folder), choices, held_NL, progress, around=around)
    chosen = scope.allocated(sites, limit)
    taken = [site.options[name] for site, name in zip(sites, chosen, strict=True)]
    stored = sum(option.bytes for option in taken)
    return SearchResult(
        recipe=_recipe(plan, choices, dict(zip(together(choices, plan.topology), chosen, strict=True)), budget),
        sites=tuple(sites),
        chosen=tuple(chosen),
        bits_per_weight=scope.weights.bits(stored),
        bytes=scope.weights.whole(stored),
        speedup=scope.weights.speedup(stored),
        cost=sum(option.cost for option in taken),
        uniform=_uniform(sites, scope.weights.chosen),
        tokens=held_NL.numel(),
        seconds=time.monotonic() - start,
    )


@dataclass(frozen=True, slots=True)
class _Scope:
    """What the choice is about. sizes: bytes of each option of each site. keeps: whether every site may stay in full precision."""

    sizes: tuple[tuple[int, ...], ...]
    weights: Weights
    keeps: bool

    @classmethod
    def of(cls, plan: Plan, choices: Choices) -> "_Scope":
        runner = BlockRunner(plan.source, plan.dtype, plan.device)
        units = together(choices, plan.topology).values()
        spaces = [space(runner, members) for members in units]
        weights = Weights.of(runner, sum(weights for weights, _ in spaces))
        keeps = all(None in options.values() for members in units for options in members.values())
        return cls(tuple(tuple(sizes.values()) for _, sizes in spaces), weights, keeps)

    def check(self, limit: Budget) -> None:
        """PlanishError if no choice keeps the budget, or if it has room for every site in full precision, where that is a candidate."""
        if self.keeps and limit.allowance(self.weights) >= (full := self.weights.chosen * self.weights.itemsize):
            raise PlanishError(
                f"budget {limit.text}: the model has room in it as it is, with {self.weights.bits(full):g} bits per weight and "
                f"{size(self.weights.whole(full))}, so nothing would be quantized. Give a smaller one, or leave keep out of the candidates."
            )
        least = smallest(self.sizes)
        if least > limit.allowance(self.weights):
            bits, whole = math.ceil(100 * self.weights.bits(least)) / 100, self.weights.whole(least)
            raise PlanishError(
                f"budget {limit.text}: the smallest candidates take {bits:g} bits per weight, {size(whole)} with everything else of the checkpoint, "
                f"{self.weights.speedup(least):.2f} times as quick. Give {limit.least(self.weights, least)}, or candidates of fewer bits."
            )

    def allocated(self, sites: Sequence[MeasuredSite], limit: Budget) -> list[str]:
        """The option of each site, by name."""
        options = [list(site.options) for site in sites]
        costs = [[option.cost for option in site.options.values()] for site in sites]
        numbers = allocate(costs, [[option.bytes for option in site.options.values()] for site in sites], limit.allowance(self.weights))
        return [names[number] for names, number in zip(options, numbers, strict=True)]


def _target(target: str) -> Target:
    for known in TARGETS:
        if known == target:
            return known
    raise PlanishError(f"target {target!r} is none of {', '.join(TARGETS)}.")


def _plan(
    recipe: Recipe | str | Path,
    model: str | Path,
    target: Target,
    device: str | None,
    dtype: torch.dtype | None,
    offload_dir: str | Path | None,
    allow_pickle: bool,
) -> Plan:
    """The compression's plan, with little text."""
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if loaded.calibration is None:
        raise PlanishError("calibration is null, but a search measures on its text. Remove the line to use the built-in text.")
    if any(scheme.weights is not None and scheme.weights.type == "float" for scheme in loaded.schemes()):
        raise PlanishError(f"recipe {loaded.name}: its weights are floats, and a search chooses among integers. Give a recipe of integers.")
    if loaded.extended and target != "planish":
        raise PlanishError(
            f"recipe {loaded.name}: {loaded.misread or 'its transforms at run time, clips, side paths or prefix run in planish alone'}. "
            "Give --target planish."
        )
    return make_plan(loaded, model, device=device, dtype=dtype or torch.float32, offload_dir=offload_dir, allow_pickle=allow_pickle)


def split(ids_NL: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """What solvers are shown, the first samples of about TOKENS tokens; and what is measured on, the last ones, of about `tokens` tokens.

    They share none, unless there is but one sample.
    """
    length = ids_NL.shape[1]
    held = min(max(1, tokens // length), max(1, len(ids_NL) - 1))
    return ids_NL[: max(1, min(TOKENS // length, len(ids_NL) - held))], ids_NL[len(ids_NL) - held :, : max(2, tokens)]


def _choices(plan: Plan, names: Sequence[str], target: Target) -> Choices:
    """The candidates of each site that the recipe quantizes. Raises PlanishError where there is no choice at all."""
    runner, known = BlockRunner(plan.source, plan.dtype, plan.device), plan.topology
    widths = runner.site_widths()
    family, packed = plan.topology.family, plan.packed
    if known.routers and target == "transformers":
        raise PlanishError("target transformers: it reads all of a mixture by one format, so there is nothing to choose. Give vllm or planish.")
    choices = {at: at_site(names, how, widths[at], target, plan.recipe, family) for at, how in packed.items() if how is not None}
    for at, options in choices.items():
        if target == "vllm" and place(at, known) != at:
            choices[at] = {name: how for name, how in options.items() if how is None or runs_experts(how)}
    for (block, name), options in choices.items():
        if not any(how is not None for how in options.values()):
            raise PlanishError(
                f"site {block}.{name}: {target} runs none of the candidates {', '.join(names)} there. Give others, or another --target; groups must "
                f"divide its {widths[block, name]} input channels."
            )
    for (block, name), members in together(choices, known).items():
        if not any(how is not None for how in next(iter(members.values())).values()):
            raise PlanishError(f"block {block}, {name}: none of the candidates {', '.join(names)} is for all of them. Give others.")
    return choices


@contextmanager
def _folder(plan: Plan) -> Iterator[Path | None]:
    """Where streams lie while the search lasts, None: in memory."""
    if not plan.offload:
        yield None
        return
    if plan.offload_dir is not None:
        plan.offload_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="planish-search-", dir=plan.offload_dir) as folder:
        yield Path(folder)


def _uniform(sites: Sequence[MeasuredSite], weights: int) -> dict[str, tuple[float, float]]:
    """Bits per weight and cost of each candidate everywhere."""
    names = [name for name in sites[0].options if all(name in site.options for site in sites)]
    found: dict[str, tuple[float, float]] = {}
    for name in names:
        options = [site.options[name] for site in sites]
        found[name] = 8 * sum(option.bytes for option in options) / weights, sum(option.cost for option in options)
    return found


def _recipe(plan: Plan, choices: Choices, chosen: Mapping[Address, str], budget: str) -> Recipe:
    """The recipe with an override for each format that is not its own scheme's."""
    kept = [override for override in plan.recipe.overrides if override.keep]
    by_scheme: dict[Scheme | None, list[Address]] = {}
    addresses = {(block, kind_of(name)): choices[block, name][chosen[place((block, name), plan.topology)]] for block, name in choices}
    for address, how in addresses.items():
        by_scheme.setdefault(None if how is None else how.scheme, []).append(address)
    base = max((scheme for scheme in by_scheme if scheme is not None), key=lambda scheme: len(by_scheme[scheme]), default=plan.recipe.scheme)
    counts = Counter(name for _, name in addresses)
    overrides = [Override(sites=patterns(mine, counts), scheme=scheme, keep=scheme is None) for scheme, mine in by_scheme.items() if scheme != base]
    return replace(
        plan.recipe,
        name=f"{plan.recipe.name}-{budget.replace(' ', '')}",
        description=f"{plan.recipe.name} with the weight format of every site chosen within {budget}.",
        scheme=base,
        overrides=(*kept, *overrides),
    )


def patterns(addresses: Sequence[Address], counts: Mapping[str, int]) -> tuple[str, ...]:
    """Site patterns for these addresses and no other: *.down where all of that name are meant. counts: how many sites there are of each name."""
    whole = {name for name, count in Counter(name for _, name in addresses).items() if count == counts[name] and count > 1}
    return (*(f"*.{name}" for name in sorted(whole)), *(f"{block}.{name}" for block, name in addresses if name not in whole))
