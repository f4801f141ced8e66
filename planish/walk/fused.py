"""What a recipe absorbs into the weights: refused where it cannot be, the draw of the rotation chosen, held against the original, and written.

Steps of the whole model (fold_norms, untie, rotate at residual) and rotate at value make a `Rewritten` checkpoint. What is chosen by a block's own
figures (smooth, scale_rms, permute), and rotate at value behind it, is done in the block's turn.

Shape suffixes: T tokens, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..calib.blocks.experts import Routes, routed_alike
from ..calib.blocks.sites import Topology
from ..calib.files.rewritten import Rewriting, Rewritten, unties
from ..calib.machine.precision import bfloat16_products
from ..calib.walk.observe import sinks
from ..calib.walk.runner import BlockRunner
from ..calib.walk.site_walk import site_inputs
from ..calib.walk.stream import relative_error
from ..common.files import once
from ..common.units import size
from ..quant.errors import PlanishError
from ..quant.formats import Scheme
from ..quant.transforms import FoldNorms, Permute, Rotate, ScaleRms, Smooth, Step, Untie
from ..quant.transforms.factors import Chain, on_input
from ..quant.transforms.rotate import across_heads, mean_keeping, mixing, rotation_at
from ..recipe.resolve import Address, matches
from ..recipe.steporder import late_value, of_the_whole, step_name, touches, value_rotation
from .learning import Learned, learned

TOLERANCE = 1e-3  # relative error of the rewritten model in float32; right mappings reach 1e-6
CHECK_TOKENS = 8  # evenly from the whole vocabulary
DRAW_TOKENS, KEPT_TOKENS = 256, 32  # that flow through the blocks once for the choice of a draw, and of them those compared at each site


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """The rewritten checkpoint, and how it came about. draw: the rotation's; ranges: the mean squared range of the normed stream's tokens with each
    draw, where they were compared. learned: where rotations were, the objective of the tokens drawn, before and after. errors: of the rewritten parts
    against the original's, relative, in float32."""

    source: Rewritten
    draw: int = 0
    ranges: tuple[float, ...] = ()
    learned: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        return {
            "draw": self.draw,
            "ranges": list(self.ranges),
            "learned": {name: list(both) for name, both in self.learned.items()},
            "errors": dict(self.errors),
        }


def fused(steps: Sequence[Step], runner: BlockRunner, schemes: Mapping[Address, Scheme | None]) -> tuple[Fused | None, tuple[str, ...]]:
    """What the steps make of the runner's checkpoint, with the first draw, None if nothing; and what the user should be told.

    Raises PlanishError where the model does not allow a step, or a step would do nothing.
    """
    _check_steps(steps, runner.topology)
    _check_sites(steps, runner.topology, schemes)
    plan = rewriting(steps, runner, 0)
    if not (plan.fold or plan.untie or plan.residual or plan.value):
        return None, ()
    return Fused(Rewritten.of(runner.checkpoint, plan)), _notes(steps, runner, plan)


def rewriting(steps: Sequence[Step], runner: BlockRunner, draw: int) -> Rewriting:
    """What the steps absorb before the walk begins."""
    known, residual, value = runner.topology, rotation_at(steps, "residual"), rotation_at(steps, "value")
    rotation: Chain = ()
    if residual is not None:
        if residual.kind == "learned" and known.norm_kind == "layer":
            raise PlanishError(
                "rotate.kind is learned, but a LayerNorm stays one only under rotations that keep the mean. Use hadamard or orthogonal."
            )
        make = mean_keeping if known.norm_kind == "layer" else mixing
        rotation = make(runner.model.config.get_text_config().hidden_size, "hadamard" if residual.kind == "learned" else residual.kind, draw)
    return Rewriting(
        fold=any(isinstance(step, FoldNorms) for step in steps),
        untie=any(isinstance(step, Untie) for step in steps),
        residual=rotation,
        value=() if value is None or late_value(steps, known) else value_rotation(value, known),
    )


def _check_steps(steps: Sequence[Step], known: Topology) -> None:
    value = rotation_at(steps, "value")
    if value is not None and value.kind == "learned" and late_value(steps, known):
        raise PlanishError(
            "steps: rotate at value is learned from o's input as the model has it, but comes after a step that scales or permutes o. Put rotate "
            "first, or use kind: hadamard."
        )
    if value is not None and value.kind == "learned" and known.without_attention:
        raise PlanishError("steps: rotate at value, kind: learned, is for models whose blocks all have attention. Use kind: hadamard.")
    for at, step in enumerate(steps):
        if isinstance(step, Rotate) and step.at == "heads":
            across_heads(step, known.heads)
        if isinstance(step, ScaleRms):
            _check_scale(step, steps[:at], known)
        if isinstance(step, Permute):
            _check_permute(step, steps[:at], known)


def _check_sites(steps: Sequence[Step], known: Topology, schemes: Mapping[Address, Scheme | None]) -> None:
    scalers = [step for step in steps if isinstance(step, (Smooth, ScaleRms))]
    turned = bool(late_value(steps, known))
    for (block, name), scheme in schemes.items():
        mine = [step_name(step) for step in scalers if matches(step.sites, block, name)]
        if len(mine) > 1:
            raise PlanishError(f"steps: {' and '.join(mine)} both scale site {block}.{name}. Give each its own sites.")
        if turned and name == "o" and scheme is not None and scheme.activations is not None and not scheme.activations.dynamic:
            raise PlanishError(
                f"steps: site {block}.o has a static activation scale, and rotate at value comes after a step that scales or permutes o, so its "
                "range is not known in time. Put rotate first, or give o dynamic activations."
            )


def _check_scale(step: ScaleRms, before: Sequence[Step], known: Topology) -> None:
    sites = [site for kind in known.kinds for site in kind.sites]
    taken = [site for site in sites if touches(step, site.name, known)]
    hosted = list(dict.fromkeys(site.name for site in sites if site.host is not None))
    if not any(site.host is not None for site in taken):
        raise PlanishError(f"scale_rms: no site of {list(step.sites)} can take a scale for free in this model. Sites that can: {', '.join(hosted)}.")
    if rotation_at(before, "residual") is not None and (streams := list(dict.fromkeys(site.name for site in taken if site.stream))):
        rest = [f'"*.{name}"' for name in hosted if name not in streams and name in ("o", "down")]
        raise PlanishError(
            f"scale_rms: the sites {', '.join(streams)} read the residual stream, which is rotated, so its channels are alike and a scale that went "
            f"into the norm before was folded away. Give sites: [{', '.join(rest)}]."
        )
    if rotation_at(before, "value") is not None and any(site.name == "o" for site in taken):
        raise PlanishError("scale_rms: it comes after rotate at value, behind which the channels of o are alike. Put scale_rms before it.")


def _check_permute(step: Permute, before: Sequence[Step], known: Topology) -> None:
    taken = [name for name in known.site_names if touches(step, name, known)]
    movable = list(dict.fromkeys(site.name for kind in known.kinds for site in kind.sites if site.makers))
    if fixed := [name for name in taken if name not in movable]:
        raise PlanishError(f"permute: the order of the channels of {', '.join(fixed)} is the residual stream's. Sites: {', '.join(movable)}.")
    if "o" in taken and late_value(before, known):
        raise PlanishError("permute: it comes after rotate at value, and that after a scale of o. Put permute before rotate, or leave one out.")


def _notes(steps: Sequence[Step], runner: BlockRunner, plan: Rewriting) -> tuple[str, ...]:
    checkpoint = runner.checkpoint
    if not checkpoint.tied:
        return ("untie: the head has weights of its own already.",) if plan.untie else ()
    if not unties(runner.topology, checkpoint, plan):
        return ()
    more = size(sum(checkpoint.tensors[source].nbytes for source in checkpoint.aliases.values()))
    why = " and ".join(step_name(step) for step in steps if of_the_whole(step))
    return (f"{why}: the head gets weights of its own, {more} more, for the embeddings' will not be the same (tie_word_embeddings: false).",)


@torch.no_grad()
def settled(steps: Sequence[Step], original: BlockRunner, ids: Tensor | None, kept: Path | None = None) -> Fused:
    """With the best draw of the rotation, and held against the original. Raises PlanishError where that computes something else.

    kept: the folder where what is found is kept, for a run that goes on.
    """
    rotate, draw = rotation_at(steps, "residual"), 0
    ranges: tuple[float, ...] = ()
    if rotate is not None and rotate.seeds > 1:
        assert ids is not None
        with bfloat16_products(False):
            ranges = once(
                kept, "draw", partial(_ranges, steps, original, ids, rotate.seeds), lambda found: (found, {}), lambda found, _: tuple(found)
            )
        draw = min(range(rotate.seeds), key=ranges.__getitem__)
    found = Learned(rewriting(steps, original, draw))
    if at := {step.at: step for step in steps if isinstance(step, Rotate) and step.kind == "learned"}:
        assert ids is not None
        plan = found.plan
        learn = partial(learned, plan, at.get("residual"), at.get("value"), original, ids)
        found = once(kept, "rotations", learn, Learned.kept, partial(Learned.again, plan))
    with bfloat16_products(False):
        return Fused(Rewritten.of(original.checkpoint, found.plan), draw, ranges, found.objectives, _checked(original, found.plan))


def _ranges(steps: Sequence[Step], original: BlockRunner, ids: Tensor, seeds: int) -> tuple[float, ...]:
    """The mean squared range of tokens before the blocks' readers of the stream, with each draw; without sink tokens."""
    rotations = [rewriting(steps, original, draw).residual for draw in range(seeds)]
    totals, count = [0.0] * seeds, 0
    for some_TC in _stream_tokens(original, ids[:1, :DRAW_TOKENS], KEPT_TOKENS):
        count += len(some_TC)
        for draw, rotation in enumerate(rotations):
            totals[draw] += _squared_ranges(on_input(rotation, some_TC))
    return tuple(total / max(1, count) for total in totals)


def _stream_tokens(original: BlockRunner, ids: Tensor, kept: int) -> Iterator[Tensor]:
    """About so many tokens before each of the blocks' readers of the stream, norms folded, without sinks: float32 (T, C)."""
    folded = BlockRunner(Rewritten.of(original.checkpoint, Rewriting(fold=True)), original.dtype, original.device)
    ((hidden, call),) = folded.start([ids])
    for index in range(len(folded.blocks)):
        block = folded.load_block(index)
        with site_inputs(block, [site for site in folded.topology.block(index).sites if site.stream]) as inputs:
            out = call.run(block, index, hidden)
        folded.release_block(index)
        keep_T = ~sinks(hidden.flatten(0, 1), out.flatten(0, 1))
        hidden = out
        for x_TC in inputs.take().values():
            kept_TC = x_TC[keep_T].float().cpu()
            yield kept_TC[:: max(1, len(kept_TC) // kept)]


def _squared_ranges(x_TC: Tensor) -> float:
    return float((x_TC.amax(1) - x_TC.amin(1)).square().sum(dtype=torch.float64))


def _checked(original: BlockRunner, plan: Rewriting) -> dict[str, float]:
    """Errors of embeddings, some blocks, and head, on a few tokens. PlanishError names the step with which one became too large."""
    plain = BlockRunner(original.checkpoint, torch.float32, original.device)
    errors = _errors(plain, plan)
    for place, error in errors.items():
        if not error <= TOLERANCE:
            step = next((name for name, part in plan.parts() if not _errors(plain, part)[place] <= TOLERANCE), "untie")
            where = "site o" if step == "rotate at value" else "the residual stream"
            raise PlanishError(
                f"{step}: {place}, {where}: the rewritten weights compute something else, off by {error:.2g} (at most {TOLERANCE:g}). The "
                f"topology of {original.topology.family} does not fit this model; leave the step out and report the model."
            )
    return errors


def _errors(plain: BlockRunner, plan: Rewriting) -> dict[str, float]:
    other = BlockRunner(Rewritten.of(plain.checkpoint, plan, exact=True), torch.float32, plain.device)
    assert isinstance(other.checkpoint, Rewritten)
    change = other.checkpoint.stream_map
    vocabulary = plain.model.config.get_text_config().vocab_size
    ids = torch.linspace(0, vocabulary - 1, CHECK_TOKENS).long()[None]
    ((hidden, call),) = plain.start([ids])
    ((found, _),) = other.start([ids])
    errors = {"embeddings": relative_error(change(hidden), found)}
    for index in plain.topology.samples:
        routes, outputs = Routes(), list[Tensor]()
        for runner, entering in ((plain, hidden), (other, change(hidden))):
            block = runner.load_block(index)
            with routed_alike(block, routes):
                outputs.append(call.run(block, index, entering))
            runner.release_block(index)
        errors[plain.block_name(index)] = max(relative_error(change(outputs[0]), outputs[1]), routes.error)
    with plain.head() as head:
        expected = torch.cat(list(head.logits(hidden[0])))
    with other.head() as head:
        errors["head"] = relative_error(expected, torch.cat(list(head.logits(found[0]))))
    return errors
