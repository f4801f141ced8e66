"""A recipe's scheme at every site of a model.

Sites are addressed as `block.site`, such as `11.down`; patterns are those of fnmatch, case-sensitive: `*.down`, `11.*`, `2?.o`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from ..calib.blocks.topology import Topology
from ..quant.errors import PlanishError
from ..quant.formats import NVFP4, NVFP4_GROUP, Scheme, WeightFormat
from .patterns import matches as matches
from .schema import Recipe

Address: TypeAlias = tuple[int, str]

SERVED_GROUPS = (128, 64, 32)
"""Group sizes that vLLM's kernels take besides one scale per channel, largest first."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe's scheme at every site of a model, None: full precision. notes: what the user should be told, such as fallbacks taken."""

    schemes: dict[Address, Scheme | None]
    notes: tuple[str, ...]


def resolve(recipe: Recipe, topology: Topology, width: Callable[[int, str], int]) -> Resolved:
    """The scheme of every site, groups fitted to its width. width(block, site): input channels of the site.

    Raises PlanishError: a pattern that matches no site; a group size that does not divide a width where the recipe has no fallback;
    overrides that leave nothing to quantize.
    """
    addresses = topology.addresses
    for key, pattern in _patterns(recipe):
        if not any(matches([pattern], *address) for address in addresses):
            names = topology.site_names
            raise PlanishError(
                f"recipe {recipe.name}: {key}: {pattern!r} matches no site. Patterns are for block.site, such as 0.{names[0]} or *.{names[0]}: "
                f"blocks 0 to {topology.block_count - 1}, sites {', '.join(names)}."
            )
    schemes: dict[Address, Scheme | None] = {}
    fallbacks: dict[str, set[str]] = defaultdict(set)
    for address in addresses:
        chosen = _scheme_at(recipe, address)
        fitted, note = _fit(chosen, recipe, address, width(*address))
        schemes[address] = fitted if fitted.weights else None
        if note:
            fallbacks[note].add(address[1])
    if not any(schemes.values()):
        raise PlanishError(f"recipe {recipe.name}: overrides keep every site in full precision, so nothing would be quantized. Narrow their sites.")
    return Resolved(schemes, tuple(f"{', '.join(sorted(names))}: {note}" for note, names in fallbacks.items()))


def _patterns(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every site pattern and the key it stands at."""
    for i, step in enumerate(recipe.steps):
        yield from ((f"steps.{i}.sites", pattern) for pattern in getattr(step, "sites", ()))
    for i, override in enumerate(recipe.overrides):
        yield from ((f"overrides.{i}.sites", pattern) for pattern in override.sites)


def _scheme_at(recipe: Recipe, address: Address) -> Scheme:
    for override in reversed(recipe.overrides):
        if matches(override.sites, *address):
            return override.scheme or Scheme()
    return recipe.scheme


def _fit(scheme: Scheme, recipe: Recipe, address: Address, width: int) -> tuple[Scheme, str | None]:
    """The scheme with group sizes that divide the width, and what to say if that is not the one asked for."""
    where = f"recipe {recipe.name}: site {address[0]}.{address[1]}"
    size = scheme.weights.group_size if scheme.weights else None
    if scheme.weights is not None and scheme.weights.kind == NVFP4 and width % NVFP4_GROUP:
        raise PlanishError(
            f"{where}: its {width} channels are not whole groups of {NVFP4_GROUP}. Keep the site by an override, or use another format."
        )
    size = scheme.activations.group_size if scheme.activations else None
    if size and width % size:
        raise PlanishError(
            f"{where}: activations.group_size {size} does not divide its {width} channels. Use {_choices(width)} or granularity token."
        )
    size = scheme.weights.group_size if scheme.weights else None
    if scheme.weights is None or size is None or width % size == 0:
        return scheme, None
    if recipe.group_fallback == "refuse":
        raise PlanishError(
            f"{where}: weights.group_size {size} does not divide its {width} input channels. "
            f"Use {_choices(width)}, granularity channel, or group_fallback: divisor."
        )
    smaller = [group for group in SERVED_GROUPS if group < size and width % group == 0]
    weights = _grouped(scheme.weights, smaller[0] if smaller and recipe.group_fallback == "divisor" else None)
    instead = f"groups of {weights.group_size}" if weights.group_size else "one scale per channel"
    return replace(scheme, weights=weights), f"groups of {size} do not divide {width} input channels; {instead} instead."


def _grouped(fmt: WeightFormat, size: int | None) -> WeightFormat:
    return replace(fmt, granularity="group" if size else "channel", group_size=size)


def _choices(width: int) -> str:
    """Group sizes that would fit, in words."""
    fitting = [str(size) for size in SERVED_GROUPS if width % size == 0] or [str(size) for size in range(2, 129) if width % size == 0]
    return f"a group_size of {' or '.join(fitting)}" if fitting else "no groups"
