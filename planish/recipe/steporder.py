"""What the steps of a recipe need of each other, of text and of whoever runs the checkpoint."""

from collections.abc import Sequence

from ..calib.blocks.fusing import head_rows
from ..calib.blocks.topology import Topology
from ..quant.errors import PlanishError
from ..quant.transforms import STEPS, FoldNorms, Permute, Polish, RaiseActivations, Rotate, ScaleRms, SideStep, Smooth, Step, SuperWeights, Untie
from ..quant.transforms.factors import Chain
from ..quant.transforms.rotate import mixing, rotation_at
from .patterns import matches

FUSED = (FoldNorms, Untie, Smooth, ScaleRms, Permute)  # absorbed by the weights, as is Rotate but at heads and keys


def step_name(step: Step) -> str:
    """As recipes write it."""
    name = next(name for name, kind in STEPS.items() if kind is type(step))
    return f"{name} at {step.at}" if isinstance(step, Rotate) else name


def of_the_whole(step: Step) -> bool:
    """Whether the step rewrites the whole model before anything is looked at."""
    return isinstance(step, (FoldNorms, Untie)) or (isinstance(step, Rotate) and step.at == "residual")


def portable(step: Step) -> bool:
    """Whether the weights absorb the step, or it only chooses formats or scales, so that any consumer runs the checkpoint."""
    return isinstance(step, (*FUSED, RaiseActivations, Polish)) or (isinstance(step, Rotate) and step.at not in ("heads", "keys"))


def needs_text(step: Step) -> bool:
    """Whether the step chooses by what the calibration's text shows, or acts on what flows with it."""
    if isinstance(step, SideStep):
        return step.needs_moments or (isinstance(step, SuperWeights) and step.places == "auto")
    if isinstance(step, Rotate):
        return step.seeds > 1 or step.kind == "learned" or step.at == "heads"
    return not of_the_whole(step)


def check_order(steps: Sequence[Step]) -> None:
    """PlanishError for steps in an order that cannot be carried out, or given twice where once is all there is."""
    seen: list[str] = []
    for step in steps:
        name = step_name(step)
        if isinstance(step, (FoldNorms, Untie, Rotate, RaiseActivations, Polish)) and name in seen:
            raise PlanishError(f"steps: {name} is given twice. Once is all there is to do: remove one.")
        if of_the_whole(step):
            late = next((before for before, given in zip(seen, steps, strict=False) if not (of_the_whole(given) or before == "prefix")), None)
            if late is not None:
                raise PlanishError(f"steps: {name} comes after {late}, but it rewrites the whole model before anything else is done. Put it first.")
        if name == "rotate at residual" and "fold_norms" not in seen:
            raise PlanishError(
                "steps: rotate at residual needs norms that multiply by 1, for their weights do not rotate along. Put fold_norms before it."
            )
        seen.append(name)
    mixed = next((step_name(step) for step in steps if isinstance(step, Permute) or (isinstance(step, Rotate) and portable(step))), None)
    if mixed is not None and any(isinstance(step, SuperWeights) and step.places for step in steps):
        raise PlanishError(
            f"steps: {mixed} moves weights before super_weight can hold any out: their places are the original model's. Remove one, or rotate "
            "inputs instead, with hadamard."
        )


def touches(step: Smooth | ScaleRms | Permute, site: str, known: Topology) -> bool:
    """Whether the step matches the site in some block."""
    return any(name == site and matches(step.sites, block, site) for block, name in known.addresses)


def value_rotation(step: Rotate, known: Topology) -> Chain:
    """What a head's values are turned by, or what that is learned from. PlanishError where no weights could absorb it."""
    sizes = [len(rows[0]) for kind in known.kinds if (rows := head_rows(kind))]
    if not sizes:
        raise PlanishError(f"steps: rotate at value: in {known.family} models a gate stands between the values and o. Leave the step out.")
    return mixing(sizes[0], step.kind, 0)


def late_value(steps: Sequence[Step], known: Topology) -> Chain:
    """What a head's values are turned by in the block's turn, as channels of o are scaled or put in another order before; else empty."""
    value = rotation_at(steps, "value")
    if value is None:
        return ()
    before = steps[: list(steps).index(value)]
    late = any(isinstance(step, (Smooth, ScaleRms, Permute)) and touches(step, "o", known) for step in before)
    return value_rotation(value, known) if late else ()
