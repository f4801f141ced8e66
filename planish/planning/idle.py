"""Which steps of a recipe find nothing to do at their sites: that is said, so that nobody takes them for part of what was measured."""

from collections.abc import Iterator, Mapping, Sequence

from ..quant.formats import Scheme
from ..quant.transforms import ClipSearch, ScaleRms, Smooth, Step
from ..recipe.resolve import Address, matches
from ..recipe.steporder import step_name


def idle(steps: Sequence[Step], schemes: Mapping[Address, Scheme | None]) -> Iterator[str]:
    """A sentence for each step all of whose sites overrides keep, or lack the quantized activations that it is about."""
    for step in steps:
        patterns = getattr(step, "sites", None)
        if patterns is None:
            continue
        mine = [scheme for address, scheme in schemes.items() if scheme is not None and matches(patterns, *address)]
        activations = [scheme.activations for scheme in mine if scheme.activations is not None]
        what = None if mine else "nothing is quantized"
        if isinstance(step, (Smooth, ScaleRms)) and not activations:
            what = "no activations are quantized"
        elif isinstance(step, ClipSearch) and not any(act.dynamic for act in activations):
            what = "no activations have a dynamic range"
        if what is not None:
            yield f"steps: {step_name(step)} does nothing, for {what} at its sites."
