"""What runs beside a site's codes: the steps' turns at its readers, what is refused before, and where super weights are.

Order at a site: super weights out, then the input's transform (flatten.py), SVDQuant's split, the solver, LoRC. Shape suffixes: O out channels, C in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..calib.blocks.sites import reader_weight
from ..calib.compressed.packing import Packed
from ..calib.machine.precision import bfloat16_products
from ..calib.outliers.super_weights import search
from ..calib.walk.runner import BlockRunner
from ..common.files import once
from ..quant.errors import PlanishError
from ..quant.formats import Scheme
from ..quant.low_rank import LowRank, lorc, svdquant, weighted_lorc
from ..quant.solvers import Moments, Rtn, Solution, Solver
from ..quant.solvers.attention import Heads
from ..quant.transforms import (
    Auto,
    FoldNorms,
    InputChoice,
    Keeping,
    Lorc,
    Prefix,
    Resq,
    Rotate,
    SideStep,
    Step,
    SuperWeights,
    Svdquant,
    Untie,
)
from ..quant.transforms.side import Place
from ..quant.transforms.super_weight import clipped, hold_out
from ..recipe.resolve import Address, matches
from .solving import Readers, solve


def located(
    steps: Sequence[Step], runner: BlockRunner, ids_NL: Tensor | None, report: Callable[[int], None], kept: Path | None = None
) -> tuple[Step, ...]:
    """The steps with the places of super weights where a recipe says auto: those of the model as it is, without a prefix.

    ids_NL: calibration tokens. report: told how many blocks of that pass are done; not called where no step says auto. kept: the folder where places
    are kept, for a run that goes on.
    """
    if not any(isinstance(step, SuperWeights) and step.places == "auto" for step in steps):
        return tuple(steps)
    assert ids_NL is not None
    places = once(
        kept, "super-weights", partial(_places, runner, ids_NL, report), lambda found: (found, {}), lambda found, _: tuple(map(tuple, found))
    )
    result: list[Step] = []
    for step in steps:
        if isinstance(step, SuperWeights) and step.places == "auto":
            mine = tuple(place for place in places if _matches(step.sites, place, runner))
            result += [replace(step, places=mine)] if mine or step.z is not None else []
        else:
            result.append(step)
    return tuple(result)


def _matches(patterns: Sequence[str], place: Place, runner: BlockRunner) -> bool:
    name = _site_of(runner, place)
    return name is not None and matches(patterns, place[0], name)


def _site_of(runner: BlockRunner, place: Place) -> str | None:
    """The name of the site that the place's layer reads; None if it is no site's reader."""
    found = runner.topology.address(f"{runner.block_name(place[0])}.{place[1]}")
    return None if found is None else found[1].name


def _places(runner: BlockRunner, ids_NL: Tensor, report: Callable[[int], None]) -> tuple[Place, ...]:
    with bfloat16_products(runner.dtype is torch.bfloat16):
        found = search(runner, ids_NL, report)
    return tuple((one.layer, one.module.removeprefix(f"{runner.block_name(one.layer)}."), one.row, one.column) for one in found)


def take_out(readers: Readers, steps: Sequence[SideStep], block: int, stored: torch.dtype) -> str:
    """Take the super weights of a block's site out of its readers, and clip what remains. Returns what was taken, in words."""
    taken: list[str] = []
    for step in (step for step in steps if isinstance(step, SuperWeights)):
        assert step.places != "auto"
        for path in readers.weights if readers.packed is not None else ():
            mine = [place[2:] for place in step.places if place[:2] == (block, path)]
            if mine:
                rest_OC, low = hold_out(readers.weights[path], mine, step.z)
                readers.weights[path] = (rest_OC.double() + low.product()).float()
                readers.put_beside(path, low, stored)
                taken += [f"{path}[{row}, {column}]" for row, column in mine]
            elif step.z is not None:
                readers.weights[path] = clipped(readers.weights[path], step.z)
    return f"beside the codes: {', '.join(taken)}" if taken else ""


def solve_beside(
    readers: Readers, steps: Sequence[SideStep], solver: Solver, moments: Moments | None, stored: torch.dtype, heads: Heads | None = None
) -> Solution | None:
    """Quantize the site's readers, low-rank paths before and after. Returns the last solution, for the record.

    moments: of what becomes codes. heads: of attention, see `solving.solve`.
    """
    if readers.packed is None or readers.packed.scheme.weights is None:
        return None
    fmt = readers.packed.scheme.weights
    with bfloat16_products(False):
        for split in (step for step in steps if isinstance(step, Svdquant)):
            assert moments is not None
            for path, w_OC in list(readers.weights.items()):
                low, _ = svdquant(
                    w_OC, split.rank, lambda r_OC: Rtn().solve(r_OC, fmt, None, stored).weight.dequantize(), moments.second_II, split.rounds
                )
                readers.put_beside(path, low, stored)
        solution = solve(readers, solver, moments, stored, heads)
        for correction in (step for step in steps if isinstance(step, Lorc)):
            for path, solved in readers.solved.items():
                readers.put_beside(path, _correction(correction, readers.weights[path] - solved.dequantize(), moments), stored)
    return solution


def _correction(step: Lorc, error_OC: Tensor, moments: Moments | None) -> LowRank:
    if not step.weighted:
        return lorc(error_OC, step.rank)
    assert moments is not None
    return weighted_lorc(error_OC, moments.second_II, step.rank)


def check_beside(steps: Sequence[Step], packed: Mapping[Address, Packed | None], runner: BlockRunner) -> None:
    """Refuse what the quantized sites have no room for: ranks, kept channels that another step would mix, places of no weight. PlanishError."""
    for address, how in packed.items():
        if how is None:
            continue
        mine = [step for step in steps if _at(step, address)]
        _check_order(mine, f"site {address[0]}.{address[1]}")
        _check_bits(mine, how.scheme, f"site {address[0]}.{address[1]}")
        for path in runner.topology.block(address[0]).site(address[1]).readers:
            shape = reader_weight(runner.blocks[address[0]].get_submodule(path)).shape
            for step in mine:
                _check_room(step, shape, f"{runner.block_name(address[0])}.{path}")
    for step in (step for step in steps if isinstance(step, SuperWeights) and step.places != "auto"):
        for place in step.places:
            assert not isinstance(place, str)
            _check_place(place, step.sites, packed, runner)


def _at(step: Step, address: Address) -> bool:
    """Whether the step does something at the site in its block's turn."""
    if isinstance(step, Rotate):
        return step.at == "heads" and address[1] == "o"
    return not isinstance(step, (Prefix, FoldNorms, Untie)) and matches(step.sites, *address)


def _check_order(steps: Sequence[Step], where: str) -> None:
    """Of the steps at one site."""
    if sum(isinstance(step, Auto) for step in steps) > 1:
        raise PlanishError(f"steps: auto is given more than once at {where}, but it chooses one transform for a site. Narrow their sites.")
    moving = [step for step in steps if isinstance(step, Rotate | InputChoice | Keeping)]
    if any(isinstance(step, Keeping) for step in moving[:-1]):
        raise PlanishError(f"steps: at {where} another transform follows quad or resq and would mix the channels that they keep. Put it before them.")


def _check_bits(steps: Sequence[Step], scheme: Scheme, where: str) -> None:
    """Of the steps at one site."""
    most = max(fmt.bits for fmt in (scheme.weights, scheme.activations) if fmt is not None)
    for step in (step for step in steps if isinstance(step, Resq)):
        if step.bits < most:
            raise PlanishError(f"steps: resq.bits is {step.bits}, but {where} has {most} bits, and the channels kept need no fewer. Give more.")


def _check_room(step: Step, shape: Sequence[int], where: str) -> None:
    """Of one step at a layer (out, in)."""
    if isinstance(step, (Lorc, Svdquant)) and step.rank > min(shape):
        raise PlanishError(f"steps: a rank of {step.rank}, but {where} is {shape[0]} by {shape[1]}. Use at most {min(shape)}, or other sites.")
    if isinstance(step, Keeping) and step.kept(shape[1]) >= shape[1]:
        raise PlanishError(f"steps: {step.kept(shape[1])} channels to keep, but {where} has {shape[1]}. Keep fewer, or use other sites.")


def _check_place(place: Place, patterns: Sequence[str], packed: Mapping[Address, Packed | None], runner: BlockRunner) -> None:
    block, path, row, column = place
    name = _site_of(runner, place) if block < runner.topology.block_count else None
    if name is None or packed.get((block, name)) is None or not matches(patterns, block, name):
        raise PlanishError(f"steps: super_weight.places has {list(place)}, but block {block} has no quantized layer {path} at the step's sites.")
    rows, columns = reader_weight(runner.blocks[block].get_submodule(path)).shape
    if not (0 <= row < rows and 0 <= column < columns):
        raise PlanishError(f"steps: super_weight.places has {list(place)}, but {runner.block_name(block)}.{path} is {rows} by {columns}.")
