"""The steps of a recipe that are carried out in a block's turn: what is absorbed by the block's own weights, and what is left for its inputs.

Shape suffixes: T tokens, C channels of a site, E channels of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..calib.blocks.fusing import head_rows, permute, rotate_values
from ..calib.blocks.sites import BlockTopology, Site, Topology
from ..calib.walk.observe import Observation
from ..quant.formats import Scheme
from ..quant.transforms import (
    Auto,
    Center,
    ClipSearch,
    Hadamard,
    InputChoice,
    Keeping,
    Permute,
    Polish,
    Rotate,
    ScaleRms,
    SideStep,
    Smooth,
    Step,
)
from ..quant.transforms.factors import Blocks, Chain, Permutation, Scale, on_input, placed
from ..quant.transforms.inputs import InputStep, SiteView, divisor
from ..quant.transforms.permute import zigzag, zigzag_in_heads
from ..quant.transforms.rotate import AcrossHeads, across_heads
from ..recipe.resolve import matches
from ..recipe.steporder import late_value, step_name
from .smoothing import Probe, Scaling, absorb_scales, checked, choose, scaler


@dataclass(frozen=True, slots=True, eq=False)
class Absorbed:
    """What a block's weights have taken in. error: relative, of the block afterwards; scales: by site, as they became."""

    error: float
    chosen: Mapping[str, Scaling]
    scales: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class BlockSteps:
    """Sorted by what they do. value: what the heads' values are turned by, if that is left for the turn; inputs: at run time; beside: side paths.

    polish: at the end of the turn."""

    scalers: tuple[Smooth | ScaleRms, ...]
    permutes: tuple[Permute, ...]
    value: Chain
    inputs: tuple[InputStep | Auto, ...]
    clips: tuple[ClipSearch, ...]
    beside: tuple[SideStep, ...]
    polish: Polish | None
    names: tuple[str, ...]

    @classmethod
    def of(cls, steps: Sequence[Step], known: Topology) -> "BlockSteps":
        """Of a recipe's steps, for a model of this topology."""
        inputs: list[InputStep | Auto] = []
        for step in steps:
            if isinstance(step, Rotate):
                inputs += [across_heads(step, known.heads)] if step.at == "heads" else []
            elif isinstance(step, InputChoice | Keeping):
                inputs.append(step)
        value = late_value(steps, known)
        late = [step for step in steps if isinstance(step, Rotate) and step.at == "value" and value]
        absorbed = [step for step in steps if isinstance(step, (Smooth, ScaleRms, Permute)) or step in late]
        return cls(
            tuple(step for step in steps if isinstance(step, (Smooth, ScaleRms))),
            tuple(step for step in steps if isinstance(step, Permute)),
            value,
            tuple(inputs),
            tuple(step for step in steps if isinstance(step, ClipSearch)),
            tuple(step for step in steps if isinstance(step, SideStep)),
            next((step for step in steps if isinstance(step, Polish)), None),
            tuple(dict.fromkeys(map(step_name, absorbed))),
        )

    def squares(self, index: int, known: BlockTopology) -> set[str]:
        """The sites of block `index` whose sums of squares are needed."""
        return {site.name for site in known.sites if isinstance(scaler(self.scalers, index, site.name), ScaleRms)}

    def absorb(
        self, block: nn.Module, known: BlockTopology, schemes: Mapping[str, Scheme | None], observed: Observation, probe: Probe, stored: torch.dtype
    ) -> Absorbed:
        """Choose what the float32 block absorbs, and let it. PlanishError if it then computes something else."""
        sites = {site.name: site for site in known.sites}
        centred = {site.name for site in known.sites for step in self.inputs if _centres(step) and matches(step.sites, probe.index, site.name)}
        chosen = choose(block, sites, schemes, observed, self.scalers, probe, partial(self._behind, known, probe.index), centred)
        scales: dict[str, Tensor] = {}
        orders = [(step, site) for step in self.permutes for site in known.sites if matches(step.sites, probe.index, site.name)]

        def change() -> None:
            scales.update(absorb_scales(block, sites, chosen, stored))
            values: Chain = (Scale(scales["o"]),) if "o" in scales else ()
            for step, site in orders:
                magnitude_C = observed.seen[site.name].absmax_C / scales.get(site.name, 1)
                index_C = _order(step, site, known, magnitude_C)
                permute(block, site, index_C)
                values += (Permutation(index_C),) if site.name == "o" else ()
            if self.value:
                rotate_values(block, known, [self.value] * len(head_rows(known)))
            if probe.prefix is not None and (values or self.value):
                probe.prefix.turn_values(probe.index, known.heads, partial(self._turned, values, known.heads))

        if not (orders or self.value or any(scaling.scale_C is not None for scaling in chosen.values())):
            return Absorbed(0.0, chosen, scales)
        touched = dict.fromkeys([*(name for name, scaling in chosen.items() if scaling.scale_C is not None), *(site.name for _, site in orders)])
        what = f"{', '.join(self.names)} at block {probe.index} ({', '.join(touched)})"
        off = checked(block, probe, what, change)
        if probe.prefix is not None:
            probe.prefix.round_values(probe.index)
        return Absorbed(off, chosen, scales)

    def _turned(self, chain: Chain, heads: int, x_TC: Tensor) -> Tensor:
        """Channels of o's input behind the chain, and then what heads' values are turned by."""
        x_TC = on_input(chain, x_TC)
        return on_input(placed(self.value, x_TC.device), x_TC.view(len(x_TC) * heads, -1)).view_as(x_TC)

    def _behind(self, known: BlockTopology, index: int, name: str, x_TC: Tensor) -> Chain:
        """What the site's input goes through whatever its scale: rotations."""
        chain: Chain = ()
        width = x_TC.shape[1]
        if self.value and name == "o":
            eye_EE = torch.eye(width // known.heads, dtype=torch.float64)
            chain = (Blocks(on_input(self.value, eye_EE)[None].to(x_TC)),)
        view = SiteView(x_TC, torch.empty(width, width, device="meta"), torch.empty(width, device="meta"), ())
        for step in self.inputs:
            if isinstance(step, (Hadamard, AcrossHeads)) and matches(step.sites, index, name):
                chain += placed(step.chain(view), x_TC.device)
        return chain


def _centres(step: InputStep | Auto) -> bool:
    return isinstance(step, Center) and step.by == "middle"


def _order(step: Permute, site: Site, known: BlockTopology, magnitude_C: Tensor) -> Tensor:
    width = len(magnitude_C)
    if site.name != "o":
        return zigzag(magnitude_C, width // divisor(width, step.block))
    size = width // known.heads
    kv_heads = len(set(site.makers[0].index)) // size
    return zigzag_in_heads(magnitude_C, kv_heads, size, size // divisor(size, step.block))
