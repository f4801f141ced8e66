"""Rotations that are learned (rotate, kind learned): of the residual stream, and of each key-value head's values in each block.

From inputs of the sites that will be quantized, drawn in proportion to what noise in them costs the model (calib/walk/sensitivity.py): so a sink,
which all tokens attend to, counts for what it is worth.

Shape suffixes: T tokens, C channels of a site, D width of the stream, E channels of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..calib.blocks.fusing import head_rows
from ..calib.blocks.sites import Site
from ..calib.files.rewritten import Rewriting, Rewritten
from ..calib.walk.runner import BlockRunner
from ..calib.walk.sensitivity import Felt, sensitivities
from ..common.files import Kept
from ..quant.transforms.factors import Blocks, Chain, on_input
from ..quant.transforms.learned import learn_rotations, objective_of, turned
from ..quant.transforms.rotate import Learning, Rotate

ANGLE, BATCH = 0.1, 1024  # of the descent: radians of the first step, tokens a step
BATCH_SAMPLES = 2  # that go through the model at once


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """The plan with its rotations learned. residual, values: the objective of the tokens drawn, before and after: of the stream, and of each block's
    values; none where nothing was learned."""

    plan: Rewriting
    residual: tuple[float, float] | None = None
    values: tuple[tuple[float, float], ...] = ()

    @property
    def objectives(self) -> dict[str, tuple[float, float]]:
        """Both by what was learned."""
        return {**({"residual": self.residual} if self.residual else {}), **{f"value {index}": both for index, both in enumerate(self.values)}}

    def kept(self) -> Kept:
        """What was learned, for `again`."""
        tensors = {f"value {index}": turns_KEE for index, turns_KEE in enumerate(self.plan.own_values)}
        if self.residual is not None:
            (rotation,) = self.plan.residual
            tensors["residual"] = rotation.tensors()["matrix"]
        return {"residual": self.residual, "values": self.values}, tensors

    @classmethod
    def again(cls, plan: Rewriting, objectives: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Learned":
        """As it was, of the plan that it began with."""
        values, residual = tuple((before, after) for before, after in objectives["values"]), None
        if values:
            plan = replace(plan, value=(), own_values=tuple(tensors[f"value {index}"] for index in range(len(values))))
        if objectives["residual"] is not None:
            plan, residual = replace(plan, residual=(Blocks(tensors["residual"]),)), tuple(objectives["residual"])
        return cls(plan, residual, values)


def learned(plan: Rewriting, residual: Rotate | None, value: Rotate | None, original: BlockRunner, ids: Tensor) -> Learned:
    """What these steps make of the plan's own rotations, from which they start. ids: the calibration's tokens, (N, L)."""
    runner = original if residual is None else BlockRunner(Rewritten.of(original.checkpoint, Rewriting(fold=True)), original.dtype, original.device)
    known, blocks = runner.topology, len(runner.blocks)
    sites = [[site for site in known.block(index).sites if _felt(site, residual, value)] for index in range(blocks)]
    text = max(step.learning.tokens for step in (residual, value) if step is not None) // 2
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[Tensor, Tensor]] = []
    values: dict[int, tuple[Tensor, tuple[float, float]]] = {}
    for index, felt in sensitivities(runner, torch.split(ids[: max(1, text // ids.shape[1])], BATCH_SAMPLES), sites):
        if residual is not None:
            streams = [site for site in sites[index] if site.stream]
            count = max(1, 2 * residual.learning.tokens // (blocks * len(streams)))
            kept += [_thinned(felt[site.name], count, generator) for site in streams]
        heads = head_rows(known.block(index))
        if value is not None and heads:
            x_TC, _ = _thinned(felt["o"], value.learning.tokens, generator)
            start_EE = _dense(plan.value, len(heads[0]))
            values[index] = _learn(x_TC, start_EE.expand(len(heads), -1, -1), value.learning, runner.device)
    found = Learned(plan)
    if value is not None:
        turns, ranges = zip(*(values[index] for index in range(blocks)), strict=True)
        found = Learned(replace(plan, value=(), own_values=turns), values=ranges)
    if residual is not None:
        x_TD, cost_T = (torch.cat(parts) for parts in zip(*kept, strict=True))
        x_TD = _drawn(x_TD, cost_T, residual.learning.tokens, generator)
        matrix_1DD, both = _learn(x_TD, _dense(plan.residual, x_TD.shape[1])[None], residual.learning, runner.device)
        found = replace(found, plan=replace(found.plan, residual=(Blocks(matrix_1DD),)), residual=both)
    return found


def _felt(site: Site, residual: Rotate | None, value: Rotate | None) -> bool:
    """Whether one of these rotations is learned from the site's inputs."""
    return (site.stream and residual is not None) or (site.name == "o" and value is not None)


def _learn(x_TC: Tensor, start_KEE: Tensor, how: Learning, device: torch.device) -> tuple[Tensor, tuple[float, float]]:
    """The rotations, learned on the device and then on the CPU, where tokens are, too; and the objective before and after."""
    x_TC, start_KEE = x_TC.to(device), start_KEE.to(device)
    with torch.enable_grad():
        found_KEE = learn_rotations(x_TC, start_KEE, how.objective, how.steps, ANGLE, batch=BATCH)
    before, after = (objective_of(turned(x_TC, some_KEE), how.objective) for some_KEE in (start_KEE, found_KEE))
    return found_KEE.cpu(), (before, after)


def _dense(rotation: Chain, width: int) -> Tensor:
    return on_input(rotation, torch.eye(width, dtype=torch.float64))


def _thinned(felt: Felt, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many of a site's tokens, and what each then stands for. Noise of a grid per token grows with the token, so its cost does too."""
    cost_T = (felt.squares_T * felt.x_TC.float().square().mean(1)).double().cpu()
    return _drawn(felt.x_TC, cost_T, count, generator), (cost_T.sum() / count).expand(count)


def _drawn(x_TC: Tensor, cost_T: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many tokens in proportion to their costs, some more than once: float32. All alike where none costs anything."""
    share_T = cost_T / cost_T.sum() if cost_T.sum() > 0 else torch.ones_like(cost_T)
    return x_TC[torch.multinomial(share_T, count, replacement=True, generator=generator).to(x_TC.device)].float().cpu()
