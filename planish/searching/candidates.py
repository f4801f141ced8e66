"""Weight formats that a search chooses from, by name: 4, 8, 4-g128, 3-g64-asym, keep; and which of them a server runs.

A name: the bits; -gN for one scale per N input channels, else one per output channel; -asym with zero points. keep: full precision.
"""

import re
from collections.abc import Sequence
from typing import Literal, TypeAlias

from ..calib.compressed.packing import Packed
from ..planning.preflight import layout_for
from ..planning.servers import runs_in_transformers, vllm_devices
from ..quant.errors import PlanishError
from ..quant.formats import Scheme, WeightFormat
from ..recipe.schema import Recipe

Target: TypeAlias = Literal["vllm", "transformers", "planish"]
TARGETS: tuple[Target, ...] = ("vllm", "transformers", "planish")
KEEP = "keep"
DEFAULTS: dict[Target, tuple[str, ...]] = {
    "vllm": ("4", "4-asym", "4-g128-asym", "4-g64-asym", "4-g32", "8", KEEP),
    "transformers": ("3", "4", "5", "6", "8", "4-g128", "4-g64", "4-g32", KEEP),
    "planish": ("3-asym", "3-g32-asym", "4-asym", "4-g128-asym", "4-g64-asym", "4-g32-asym", "5-asym", "5-g64-asym", "6-asym", "8", KEEP),
}
_NAME = re.compile(r"([2-8])(?:-g(\d+))?(-asym)?")


def candidate(name: str) -> WeightFormat | None:
    """The format of this name; None for keep. Raises PlanishError for another name."""
    if name == KEEP:
        return None
    found = _NAME.fullmatch(name)
    if found is None:
        raise PlanishError(f"candidate {name!r} is none. Write bits, group and symmetry like 4, 8, 4-g128, 4-g32-asym, or keep.")
    bits, group, asymmetric = found.groups()
    size = None if group is None else int(group)
    return WeightFormat(bits=int(bits), symmetric=asymmetric is None, granularity="channel" if size is None else "group", group_size=size)


def names_for(target: Target, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The candidates asked for, each once, or those usual for the target."""
    names = tuple(dict.fromkeys(DEFAULTS[target] if asked is None else asked))
    for name in names:
        candidate(name)
    if len(names) < 2:
        raise PlanishError(f"candidates {', '.join(names) or 'none'}: there is nothing to choose from. Give at least two.")
    return names


def at_site(names: Sequence[str], how: Packed, width: int, target: Target, recipe: Recipe, family: str) -> dict[str, Packed | None]:
    """The candidates that fit a site of this width and whose checkpoint the target runs, with the activations that the recipe has there.

    how: as the recipe would store it at this site. None: full precision.
    """
    found: dict[str, Packed | None] = {}
    for name in names:
        fmt = candidate(name)
        if fmt is None:
            found[name] = None
        elif fmt.group_size is None or width % fmt.group_size == 0:
            scheme = Scheme(weights=fmt, activations=how.scheme.activations)
            packed = Packed(scheme, layout_for(recipe, scheme, family))
            if _runs(packed, target):
                found[name] = packed
    return found


def _runs(packed: Packed, target: Target) -> bool:
    if target == "planish":
        return True
    return bool(vllm_devices(packed)) if target == "vllm" else runs_in_transformers(packed)
