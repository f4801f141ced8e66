"""Whether the step raise_activations can be carried out, and where; what can be said of it before anything is measured."""

from collections.abc import Mapping, Sequence

from ..calib.compressed.packing import Packed
from ..quant.errors import PlanishError
from ..quant.transforms import RaiseActivations, Step
from ..recipe.resolve import Address, matches


def raising_step(steps: Sequence[Step]) -> RaiseActivations | None:
    """The step, if a recipe has it."""
    return next((step for step in steps if isinstance(step, RaiseActivations)), None)


def candidates(step: RaiseActivations, packed: Mapping[Address, Packed | None]) -> dict[Address, Packed]:
    """The sites that may be raised. Raises PlanishError where there are none, or where the share is not one site."""
    found = {
        address: how
        for address, how in packed.items()
        if how is not None and how.scheme.activations is not None and how.scheme.activations.bits < step.bits and matches(step.sites, *address)
    }
    if not found:
        raise PlanishError(f"steps: raise_activations matches no site whose activations have fewer than {step.bits} bits. Widen its sites.")
    if not step.count(len(packed)):
        raise PlanishError(
            f"steps: raise_activations.share is {step.share}, less than one of {len(packed)} sites. Give at least {1 / len(packed):.3g}."
        )
    return found


def check_raising(steps: Sequence[Step], packed: Mapping[Address, Packed | None]) -> tuple[str, ...]:
    """What the user should be told. PlanishError as `candidates`."""
    step = raising_step(steps)
    if step is None:
        return ()
    count = min(step.count(len(packed)), len(candidates(step, packed)))
    return (f"raise_activations: up to {count} of {len(packed)} sites get {step.bits}-bit activations; which, is measured first.",)
