"""What each weight format costs at each site of a model, alone: the error of the readers' outputs, and the divergence of the whole model.

One pass over the blocks in full precision. At each site the recipe's solver quantizes the readers to every candidate, on the moments of what arrives
in the full-precision model. For the formats that are tried whole a stream goes on from there to the model's end, with the site quantized and all else
as it was, and its mean KL divergence from the model as it was is the cost. Other formats' costs follow from that by their squared output errors, sink
tokens left out: for small errors the divergence is quadratic in them. Divergence and errors are of text that the solver was not shown.

Shapes: ids (N, L) windows of token numbers. Suffixes: T tokens, C channels of a site, O out channels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..calib.blocks.sites import Topology, kind_of, reader_weight
from ..calib.compressed.packing import Packed, stored_size
from ..calib.walk.observe import sinks
from ..calib.walk.runner import BlockRunner
from ..calib.walk.site_walk import SiteWalk, site_inputs, walking
from ..compressing.absorbed import AbsorbedBlocks
from ..eval.scores.score import arithmetic, stream_comparisons
from ..eval.scores.variants import Key, Variants
from ..quant.errors import PlanishError
from ..quant.linear import QuantizedLinear
from ..quant.solvers import Moments, Solver
from ..recipe.resolve import Address
from ..walk.beside import solve_beside
from ..walk.block import Turn
from ..walk.callbacks import Progress
from ..walk.solving import Readers, gather, settle

PROBED = 5.0  # bits per weight, at most, of the candidate that stands for the others
CLIP_GRID = 20  # steps of a solver's clip search, at most, while candidates are measured: most of the time goes there


@dataclass(frozen=True, slots=True)
class Option:
    """A format at a site. bytes: of its readers' weights; error: of their outputs, relative; cost: mean KL divergence per token in nats.

    measured: whether the cost was, or follows from another format's."""

    bytes: int
    error: float
    cost: float
    measured: bool


@dataclass(frozen=True, slots=True)
class MeasuredSite:
    """A site's options by name, or those of a block's experts together (EXPERTS). weights: how many its readers have."""

    block: int
    site: str
    weights: int
    options: Mapping[str, Option]


Choices = Mapping[Address, Mapping[str, Packed | None]]
"""The candidates at each site, by name; None: full precision."""
EXPERTS = "experts"
"""What stands for the sites of all experts of a block, whose format is one: servers compute them at once."""


def place(address: Address, known: Topology) -> Address:
    """The block, and the name under which the site gets its format."""
    return (address[0], EXPERTS) if known.block(address[0]).routers and kind_of(address[1]) in ("gate_up", "down") else address


def together(choices: Choices, known: Topology) -> dict[Address, dict[Address, Mapping[str, Packed | None]]]:
    """The sites that get one format, under its place, each with the candidates that all of them have."""
    found: dict[Address, dict[Address, Mapping[str, Packed | None]]] = {}
    for address, options in choices.items():
        found.setdefault(place(address, known), {})[address] = options
    for members in found.values():
        shared = set.intersection(*(set(options) for options in members.values()))
        members |= {address: {name: how for name, how in options.items() if name in shared} for address, options in members.items()}
    return found


def measure(blocks: AbsorbedBlocks, choices: Choices, ids_NL: Tensor, progress: Progress, *, around: float | None = None) -> list[MeasuredSite]:
    """All sites of `choices`, in the model's order. ids_NL: for divergence and errors. around: bits per weight; only the candidate that is nearest to
    them is tried whole at a site, and the others' costs follow; None: all are.

    Raises PlanishError for a recipe without calibration text.
    """
    if blocks.streams is None:
        raise PlanishError("calibration is null, but a search measures on its text. Remove the line to use the built-in text.")
    runner, count = blocks.runner, blocks.runner.topology.block_count
    batches = list(torch.split(ids_NL, 1))
    units = together(choices, runner.topology)
    tried = {at: set(next(iter(members.values()))) if around is None else {probe(runner, members, around)} for at, members in units.items()}
    errors: dict[Address, dict[str, float]] = {}
    with arithmetic(runner.dtype, as_walked=True):
        variants: Variants | None = None
        progress.stage("measuring sites", count)
        for index in range(count):
            with blocks.block(index) as (block, turn):
                variants = variants or Variants.start(runner, batches)
                found, changed = _block(blocks, block, turn, units, tried, _ordinary_inputs(blocks, block, index, variants))
                errors |= found
                variants.advance(block, index, changed)
            progress.step(index + 1)
        assert variants is not None
        progress.stage("measuring divergence", sum(batch.shape[1] - 1 for batch in batches))
        compared = stream_comparisons(runner, runner, batches, variants.plain, list(variants.streams.values()), progress.step)
    divergence = {key: comparison.kl for key, comparison in zip(variants.streams, compared, strict=True)}
    return [_site(runner, at, members, errors[at], divergence) for at, members in units.items()]


def _block(
    blocks: AbsorbedBlocks,
    block: nn.Module,
    turn: Turn,
    units: Mapping[Address, Choices],
    tried: Mapping[Address, set[str]],
    inputs: Mapping[str, Tensor],
) -> tuple[dict[Address, dict[str, float]], dict[Key, Mapping[str, nn.Module]]]:
    """The errors of every candidate in the block, and the readers as modules of those that are tried whole."""
    streams, runner = blocks.streams, blocks.runner
    assert streams is not None
    assert streams.before is not None
    squares: dict[Address, dict[str, tuple[float, float]]] = {}
    changed: dict[Key, dict[str, nn.Module]] = {}
    passes = turn.passes(block, streams, streams.before)
    readers = {name: Readers.of(block, site, turn.packed[name], turn.static[name], turn.stored) for name, site in turn.sites.items()}
    with walking(block, list(turn.sites.values()), passes, streams.replay, blocks.compressor.workers) as walk:
        for name, site in readers.items():
            at = place((turn.index, name), runner.topology)
            plain = Readers(site.site, None, None, dict(site.weights), dict(site.biases), {})
            if (options := units.get(at, {}).get((turn.index, name))) is not None:
                sums = squares.setdefault(at, {})
                for option, trial in _trials(turn, site, walk, options, blocks.plan.recipe.solver):
                    modules = _modules(trial, runner.dtype)
                    off, size = _squares(modules, plain, inputs[name])
                    before = sums.get(option, (0.0, 0.0))
                    sums[option] = before[0] + off, before[1] + size
                    if option in tried[at]:
                        changed.setdefault((*at, option), {}).update(modules)
            settle(plain, walk, runner.dtype, torch.float32)
    errors = {at: {option: (off / size) ** 0.5 if size else 0.0 for option, (off, size) in sums.items()} for at, sums in squares.items()}
    return errors, dict(changed)


def _trials(turn: Turn, site: Readers, walk: SiteWalk, choices: Mapping[str, Packed | None], solver: Solver) -> Iterator[tuple[str, Readers]]:
    """Each candidate with the site's readers solved for it, one after the other."""
    name = site.site.name
    turn.take_out(site)
    turn.flatten_input(site, walk)
    assert site.packed is not None
    moments = gather(site, walk, turn.observation.keep_T, None, solver.held_share)
    quick = quicker(solver)
    if quick.needs_cross:
        moments = _uncrossed(moments)
    for option, how in choices.items():
        if how is not None:
            packed = replace(site.packed, scheme=replace(site.packed.scheme, weights=how.scheme.weights), layout=how.layout)
            trial = replace(site, packed=packed, weights=dict(site.weights), solved={}, low=dict(site.low))
            solve_beside(trial, turn.beside[name], quick, moments, turn.stored)
            yield option, trial


def _ordinary_inputs(blocks: AbsorbedBlocks, block: nn.Module, index: int, variants: Variants) -> dict[str, Tensor]:
    """What the plain stream's tokens that are no sinks make the inputs of the block's sites: (T, C) each."""
    original, sites = blocks.runner.checkpoint.original_stream, blocks.runner.topology.block(index).sites
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    with site_inputs(block, sites) as seen:
        for call, hidden in zip(variants.calls, variants.plain, strict=True):
            out = call.run(block, index, hidden)
            keep_T = ~sinks(original(hidden).flatten(0, 1), original(out).flatten(0, 1))
            for name, x_TC in seen.take().items():
                found[name].append(x_TC[keep_T] if bool(keep_T.any()) else x_TC)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _squares(modules: Mapping[str, nn.Module], plain: Readers, x_TC: Tensor) -> tuple[float, float]:
    """Squares of what the readers' outputs are off by, and of the outputs."""
    off = size = 0.0
    for path, module in modules.items():
        bias_O = plain.biases[path]
        y_TO = nn.functional.linear(x_TC, plain.weights[path].to(x_TC), None if bias_O is None else bias_O.to(x_TC))
        off += float((module(x_TC) - y_TO).double().square().sum())
        size += float(y_TO.double().square().sum())
    return off, size


def quicker(solver: Solver) -> Solver:
    """The solver with a clip search of CLIP_GRID steps at most."""
    if solver.clip is not None and solver.clip.grid > CLIP_GRID:
        return replace(solver, clip=replace(solver.clip, grid=CLIP_GRID))
    return solver


def _uncrossed(moments: Moments) -> Moments:
    """Nothing is lost before a site whose input comes from the full-precision model."""
    held = None if moments.held_out is None else _uncrossed(moments.held_out)
    return replace(moments, cross_II=torch.zeros_like(moments.second_II), held_out=held)


def _modules(readers: Readers, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The readers as they will run."""
    return {
        path: QuantizedLinear(weight, readers.biases[path], readers.activations, readers.static, readers.chain, dtype, readers.side(path))
        for path, weight in readers.solved.items()
    }


def probe(runner: BlockRunner, members: Choices, around: float) -> str:
    """The candidate that is tried whole where one is: the quantized one whose bits per weight are nearest to `around` (at most PROBED).

    The choice will be near it, so that little depends on how other costs follow; of many bits the divergence would drown in rounding.
    members: the sites that get one format.
    """
    weights, sizes = space(runner, members)
    quantized = [name for name, how in next(iter(members.values())).items() if how is not None]
    return min(quantized, key=lambda name: (abs(8 * sizes[name] / weights - min(around, PROBED)), sizes[name]))


def space(runner: BlockRunner, members: Choices) -> tuple[int, dict[str, int]]:
    """How many weights the readers of these sites have, and the bytes that each candidate makes of them."""
    weights, sizes, itemsize = 0, dict.fromkeys(next(iter(members.values())), 0), runner.checkpoint.dtype.itemsize
    for (index, name), choices in members.items():
        shapes = [tuple(reader_weight(runner.blocks[index].get_submodule(path)).shape) for path in runner.topology.block(index).site(name).readers]
        mine = sum(rows * columns for rows, columns in shapes)
        weights += mine
        for option, how in choices.items():
            sizes[option] += mine * itemsize if how is None else sum(stored_size(how, rows, columns, itemsize) for rows, columns in shapes)
    return weights, sizes


def _site(runner: BlockRunner, at: Address, members: Choices, errors: Mapping[str, float], divergence: Mapping[Key, float]) -> MeasuredSite:
    weights, sizes = space(runner, members)
    choices = next(iter(members.values()))
    known = next(name for name in choices if (*at, name) in divergence)
    options: dict[str, Option] = {}
    for name, how in choices.items():
        exact = divergence.get((*at, name))
        scaled = divergence[(*at, known)] * (errors[name] / errors[known]) ** 2 if how is not None and errors[known] else 0.0
        options[name] = Option(sizes[name], errors.get(name, 0.0), max(0.0, scaled if exact is None else exact), exact is not None)
    return MeasuredSite(*at, weights, options)
